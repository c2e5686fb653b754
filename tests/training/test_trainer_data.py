"""What the trainer makes of the rows that users give: other forms, wrong ids, transforms and bad rows."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import ImageOps
from transformers import TrainerCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, as_grounding_dataset, load_grounding_dataset
from tests.fixtures.models import ONE_STEP, tiny_model
from tests.fixtures.own_rows import PLACED, write_images
from tests.fixtures.tiny_teacher import TinyTeacher


@pytest.fixture
def dataset():
    shapes = load_grounding_dataset("shapes", split="train", num_images=4)
    return shapes.select_columns(["image", "image_id", "expression", "box"])


@pytest.fixture
def make_trainer(tmp_path, processor):
    def make(train=None, evaluated=None, teacher=None, **arguments) -> EpmVGTrainer:
        settings = {**ONE_STEP, "output_dir": str(tmp_path), "per_device_train_batch_size": 2, **arguments}
        return EpmVGTrainer(
            tiny_model(box_head="map"),
            EpmVGTrainingArguments(**settings),
            train_dataset=train,
            eval_dataset=evaluated,
            processing_class=processor,
            teacher=teacher,
        )

    return make


def mirror(row: dict) -> dict:
    x0, y0, x1, y1 = row["box"]
    width = row["image"].width
    return {"image": ImageOps.mirror(row["image"]), "box": [width - x1, y0, width - x0, y1]}


def test_datasets_whose_ids_coincide_are_evaluated_as_apart(make_trainer, dataset):
    mirrored = dataset.map(mirror)
    trainer = make_trainer()
    apart = [trainer.predict(each) for each in (dataset, mirrored)]
    together = trainer.predict(concatenate_datasets([dataset, mirrored]))
    np.testing.assert_array_equal(together.predictions, np.concatenate([each.predictions for each in apart]))
    assert together.metrics["test_mean_iou"] == pytest.approx(
        np.mean([each.metrics["test_mean_iou"] for each in apart]), abs=1e-6
    )


def test_a_transform_is_seen_in_training_and_evaluation(make_trainer, dataset):
    def transform(batch: dict) -> dict:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        changed = [{**row, **mirror(row)} for row in rows]
        return {name: [row[name] for row in changed] for name in batch}

    mirrored, transformed = dataset.map(mirror), dataset.with_transform(transform)
    trainer = make_trainer(transformed, transformed, teacher=TinyTeacher(), max_steps=2)
    trainer.train()
    expected, found = (trainer.predict(each).predictions for each in (mirrored, transformed))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert trainer.teaching._cache is None


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "undecoded", "stream"])
def test_every_form_of_a_dataset_trains_alike(make_trainer, dataset, form):
    changed = dataset
    if form == "undecoded":
        changed = dataset.cast_column("image", Image(decode=False))
    elif form == "stream":
        dataset, changed = dataset.to_iterable_dataset(), dataset.to_iterable_dataset().with_format("torch")
    else:
        changed = dataset.with_format(form)
    losses = []
    for each in (dataset, changed):
        trainer = make_trainer(each, each, seed=0, augment=True)
        losses.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert losses[0] == losses[1]


def with_bad_box(dataset: Dataset, row: int = 9) -> Dataset:
    return dataset.map(lambda values, index: {"box": [1, 2, 254, 50]} if index == row else values, with_indices=True)


BAD_BOX = r"row 9 \(image_id '0-train-000001'\): the box \[1, 2, 254, 50\] is not within the \d+ x \d+ pixels"


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_bad_row_is_named_before_the_first_step(make_trainer, dataset, name):
    bad = with_bad_box(dataset)
    train, evaluated = (bad, dataset) if name == "train_dataset" else (dataset, bad)
    trainer = make_trainer(train, evaluated, eval_strategy="epoch", augment=True)
    with pytest.raises(ValueError, match=f"^{name}, {BAD_BOX}"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match=f"^{BAD_BOX}"):
        make_trainer().predict(bad)


@pytest.mark.parametrize("form", ["stream", "transform"])
def test_a_bad_row_is_named_as_it_was_before_augmentation(make_trainer, dataset, form):
    bad = with_bad_box(dataset)
    bad = bad.to_iterable_dataset() if form == "stream" else bad.with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match=f"^{BAD_BOX}"):
        make_trainer(bad, augment=True, max_steps=100).train()


@pytest.mark.parametrize("streamed", [False, True])
def test_boxes_that_are_all_empty_are_no_training(make_trainer, dataset, streamed):
    columns = dataset.with_format("arrow")[:].drop_columns("box").to_pydict()
    features = Features({**dataset.features, "box": List(Value("float32"), length=4)})
    empty = Dataset.from_dict({**columns, "box": [None] * len(dataset)}, features)
    empty = empty.to_iterable_dataset() if streamed else empty
    message = "no row of the stream had a box" if streamed else "no row of train_dataset has a box"
    with pytest.raises(ValueError, match=message):
        make_trainer(empty).train()
    make_trainer(empty, teacher=TinyTeacher()).train()


def test_a_teacher_is_not_asked_from_its_cache_for_files_that_changed(make_trainer, dataset, tmp_path):
    def paths() -> Dataset:
        rows = [{**row, "image": str(tmp_path / f"{row['image_id']}.png")} for row in dataset]
        return as_grounding_dataset(Dataset.from_list(rows))

    embeddings = []
    for change in (lambda image: image, ImageOps.invert):
        for row in dataset:
            change(row["image"]).save(tmp_path / f"{row['image_id']}.png")
        rows = paths()
        rows._fingerprint = "the same"
        trainer = make_trainer(rows, teacher=TinyTeacher(), teacher_cache_dir=str(tmp_path / "cache"))
        trainer.train()
        (batch,) = list(trainer.get_train_dataloader())[:1]
        embeddings.append(batch["teacher_image_embeds"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not np.allclose(*embeddings)


def test_a_folder_of_images_that_vanishes_leaves_the_last_checkpoint(make_trainer, tmp_path):
    rows = [
        {"image": str(write_images(tmp_path / "images") / name), "expression": text, "box": box}
        for name, text, box in PLACED
    ]
    dataset = as_grounding_dataset(Dataset.from_list(rows[:5]))

    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                (tmp_path / "images").rename(tmp_path / "elsewhere")

    trainer = make_trainer(dataset, max_steps=8, save_strategy="steps", save_steps=2)
    trainer.add_callback(Remove())
    with pytest.raises(
        ValueError, match=r"row \d.*: the image cannot be read \(.* No such file or directory: '.*images.*'"
    ):
        trainer.train()
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    resumed = make_trainer(dataset, max_steps=8, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and "loss" in resumed.state.log_history[1]


def test_the_log_says_that_most_expressions_have_unknown_words(make_trainer, dataset, caplog):
    german = dataset.map(lambda row: {"expression": "der Kreis links"})
    make_trainer(german, augment=True).train()
    assert "32 of 32 expressions looked at have words that the augmentation does not know (der, kreis, links)" in (
        caplog.text
    )
    caplog.clear()
    for trainer in (make_trainer(german), make_trainer(dataset, augment=True)):
        trainer.train()
    assert "does not know" not in caplog.text
