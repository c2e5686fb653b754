from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

from epmvg_hf import (
    EpmVGForVisualGrounding,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    load_grounding_dataset,
)
from tests.fixtures.models import ONE_STEP, tiny_model
from tests.fixtures.tiny_teacher import TinyTeacher


@pytest.fixture(scope="module")
def rows():
    return load_grounding_dataset("shapes", split="train", num_images=4).select(range(8))


@pytest.fixture(scope="module")
def validation():
    return load_grounding_dataset("shapes", split="validation", num_images=4).select(range(6))


def make_trainer(folder, processor, rows, validation=None, model=None, **changes) -> EpmVGTrainer:
    own = {name: changes.pop(name) for name in ("teacher", "caption_dataset") if name in changes}
    return EpmVGTrainer(
        model=model or tiny_model(box_head="map"),
        args=EpmVGTrainingArguments(**{**ONE_STEP, "output_dir": str(folder), **changes}),
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=processor,
        **own,
    )


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def results_of(card: ModelCard) -> list[tuple]:
    results = card.data.eval_results or []
    return [(one.dataset_name, one.dataset_split, one.metric_name, one.metric_value) for one in results]


def test_the_card_tells_of_the_run(tmp_path, processor, rows, validation, monkeypatch):
    script = str(tmp_path / "private" / "run_grounding.py")
    monkeypatch.setattr("sys.argv", [script, "--data_dir", str(tmp_path / "flickr"), "--hub_token", "hf_secret"])
    trainer = make_trainer(
        tmp_path / "out", processor, rows, validation,
        teacher=TinyTeacher(), caption_dataset=rows.select(range(3)).remove_columns("box"),
        vision_learning_rate=1e-5, teacher_cache_dir=str(tmp_path / "cache"), cache_teacher=False,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    predicted = trainer.predict(rows).metrics
    trainer.predict(validation.select(range(2)))  # to look at; the whole split stays in the card
    trainer.create_model_card(
        license="apache-2.0", language="en", teacher=f"local-dir:{tmp_path}/clip", tags="demo", dataset_args="all"
    )

    card = card_of(tmp_path / "out")
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", "en", ["shapes"])
    assert {"visual-grounding", "demo"} <= set(card.data.tags) and card.data.model_name == "out"
    found = results_of(card)
    assert ("shapes", "validation", "Acc@0.5", round(metrics["eval_acc@0.5"], 4)) in found
    assert ("shapes", "train", "mean IoU", round(predicted["test_mean_iou"], 4)) in found
    assert "| shapes all | validation | 6 |" in card.text
    assert "was trained from scratch on 8 rows of shapes, and on 3 expressions or captions without boxes." in card.text
    assert (
        f"from local-dir:clip of 24 dimensions at 64 pixels (fingerprint {TinyTeacher().fingerprint[:16]})"
        in card.text
    )
    assert "It taught its map of patches and expressions (weight 1)." in card.text
    assert "python run_grounding.py --data_dir flickr\n" in card.text
    assert "* `vision_learning_rate`: 1e-05" in card.text and "* `training_steps`: 1" in card.text
    assert str(tmp_path) not in str(card) and "hf_secret" not in str(card)

    trainer.create_model_card()
    assert "from tiny colours of 24 dimensions" in card_of(tmp_path / "out").text
    trainer.teacher.name = None  # made by hand
    trainer.create_model_card()
    assert "from a CLIP of 24 dimensions" in card_of(tmp_path / "out").text


def test_only_what_the_present_weights_reached_is_in_the_card(tmp_path, processor, rows, validation):
    trainer = make_trainer(tmp_path, processor, rows, validation)
    before = trainer.evaluate()
    trainer.create_model_card()
    assert ("shapes", "validation", "Acc@0.5", round(before["eval_acc@0.5"], 4)) in results_of(card_of(tmp_path))
    assert "## Training" not in card_of(tmp_path).text

    trainer.train()
    trainer.create_model_card()
    assert results_of(card_of(tmp_path)) == []
    assert "## Training" in card_of(tmp_path).text


def test_the_best_checkpoint_has_the_figures_of_its_own_evaluation(tmp_path, processor, rows, validation):
    trainer = make_trainer(
        tmp_path, processor, rows, validation,
        max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="mean_iou", greater_is_better=True, learning_rate=0.02,
    )  # fmt: skip
    trainer.train()
    trainer.create_model_card()
    logged = {log["step"]: log for log in trainer.state.log_history if "eval_mean_iou" in log}
    best = max(logged, key=lambda step: logged[step]["eval_mean_iou"])
    assert best != 3  # else this test would show nothing
    card = card_of(tmp_path)
    assert ("shapes", "validation", "mean IoU", round(logged[best]["eval_mean_iou"], 4)) in results_of(card)
    assert all(f"| {step}" in card.text for step in logged)  # the table of the training


def test_figures_of_weights_that_were_never_saved_are_not_those_of_the_model(tmp_path, processor, rows, validation):
    """The first step was the best, but the second is the only one with a checkpoint, so its weights stay."""
    trainer = make_trainer(
        tmp_path, processor, rows, validation, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="mean_iou",
        greater_is_better=True,
    )  # fmt: skip
    scores = iter([0.75, 0.25])
    trainer.compute_metrics = lambda evaluated: {"mean_iou": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint is None
    trainer.create_model_card()
    assert results_of(card_of(tmp_path)) == [("shapes", "validation", "mean IoU", 0.25)]


def test_push_to_hub_uploads_the_run_with_its_card(tmp_path, processor, rows, validation, hub):
    trainer = make_trainer(tmp_path / "out", processor, rows, validation, hub_model_id="lab/grounder")
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(license="mit", tags=["mine"])
    files = hub.files["lab/grounder"]
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= set(files)
    card = ModelCard(hub.card("lab/grounder"))
    assert card.data.license == "mit" and "mine" in card.data.tags and len(results_of(card)) == 3
    assert 'model="lab/grounder"' in card.text and card.data.model_name == "grounder"


def test_a_failed_push_loses_nothing(tmp_path, processor, rows, hub):
    """Even if the repository cannot be made, which Trainer asks for before it saves anything."""
    trainer = make_trainer(tmp_path / "out", processor, rows, hub_model_id="lab/grounder")
    trainer.train()
    hub.fails = True
    with pytest.raises(ConnectionError):
        trainer.push_to_hub()
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all((weights[name] == tensor).all() for name, tensor in trainer.model.state_dict().items())
    EpmVGForVisualGrounding.from_pretrained(tmp_path / "out")

    hub.fails = False
    trainer.push_to_hub()
    pushed = load(hub.files["lab/grounder"]["model.safetensors"])
    assert all((pushed[name] == tensor).all() for name, tensor in weights.items())


def test_a_model_trained_further_no_longer_has_the_card_of_its_folder(tmp_path, processor, rows, hub):
    tiny_model(box_head="map").save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text("---\nlicense: mit\n---\n\nOf the old weights.\n")
    model = EpmVGForVisualGrounding.from_pretrained(tmp_path / "old")
    trainer = make_trainer(tmp_path / "new", processor, rows, model=model)
    trainer.train()
    model.push_to_hub("early")
    trainer.create_model_card()
    model.push_to_hub("late")
    processor.push_to_hub("late")
    assert "Of the old weights." not in hub.card("me/early") + hub.card("me/late")
    assert "was trained from a saved model on 8 rows of shapes." in hub.card("me/late")
