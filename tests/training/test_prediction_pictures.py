"""Pictures of predictions in the logs of reporters, looked at pixel by pixel."""

import io

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageColor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, ImageGroups, load_grounding_dataset
from epmvg_hf.evaluation.evaluated_rows import EvaluatedRows
from epmvg_hf.training import prediction_pictures
from epmvg_hf.training.prediction_pictures import IMAGE_SIDE, PREDICTED_COLOUR, TRUE_COLOUR, draw_predictions
from tests.fixtures.models import ONE_STEP, tiny_model
from tests.fixtures.rows import coloured_rows


class Writer:
    """Keeps the images that a writer of TensorBoard gets, by their names and steps."""

    def __init__(self):
        self.images: dict[tuple[str, int], np.ndarray] = {}

    def add_image(self, tag, img_tensor, global_step, dataformats):
        assert dataformats == "HWC" and img_tensor.dtype == np.uint8
        self.images[tag, global_step] = img_tensor

    def ignore(self, *args):
        pass

    add_text = add_scalar = flush = close = ignore


class FakeTensorBoard(TensorBoardCallback):
    """transformers' callback, which needs no TensorBoard in its methods, but in its constructor."""

    def __init__(self, writer: Writer):
        self.tb_writer, self.logging_dir = writer, None
        self._SummaryWriter = lambda log_dir: writer


@pytest.fixture
def dataset():
    return load_grounding_dataset("shapes", split="validation", num_images=6)


@pytest.fixture
def make_trainer(tmp_path, processor, dataset):
    def make(writer: Writer | None = None, evaluated=dataset, model=None, **arguments) -> EpmVGTrainer:
        return EpmVGTrainer(
            model or tiny_model(box_head="map"),
            EpmVGTrainingArguments(str(tmp_path), **{**ONE_STEP, "learning_rate": 1e-2, **arguments}),
            train_dataset=dataset,
            eval_dataset=evaluated,
            processing_class=processor,
            callbacks=None if writer is None else [FakeTensorBoard(writer)],
        )

    return make


def _share_on_border(picture: np.ndarray, box: np.ndarray, size: tuple[int, int], colour: str) -> float:
    """How much of the border of a box, xyxy pixels of an image of this size, has a colour in its picture."""
    scale = IMAGE_SIDE / max(size)
    x0, y0, x1, y1 = (round(side) for side in (np.clip(box, 0, [*size, *size]) * scale).tolist())
    inside = picture[y0:y1, x0:x1]
    border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    return (border == ImageColor.getrgb(colour)).all(axis=-1).mean()


def _check_picture(picture: np.ndarray, row: dict, predicted: np.ndarray) -> None:
    size = row["image"].size
    assert picture.shape[1] == round(size[0] * IMAGE_SIDE / max(size)) and picture.shape[0] > picture.shape[1] * 0.5
    # A label may lie on the border of the other box, and the predicted box on that of the true one.
    assert _share_on_border(picture, predicted, size, PREDICTED_COLOUR) > 0.7
    assert _share_on_border(picture, np.array(row["box"]), size, TRUE_COLOUR) > 0.4
    elsewhere = predicted + np.array([9, 9, -9, -9])
    assert _share_on_border(picture, elsewhere, size, PREDICTED_COLOUR) < 0.4


def test_each_evaluation_shows_the_same_rows_with_the_boxes_that_it_found(make_trainer, dataset):
    writer = Writer()
    trainer = make_trainer(writer, max_steps=4, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    rows = [0, 15, 31, 47]
    assert list(writer.images) == [(f"eval/predictions/row_{row}", step) for step in (0, 2, 4) for row in rows]
    output = trainer.predict(dataset)
    for row in rows:
        _check_picture(writer.images[f"eval/predictions/row_{row}", 4], dataset[row], output.predictions[row])
        assert not np.array_equal(*(writer.images[f"eval/predictions/row_{row}", step] for step in (0, 4)))


def test_pictures_cost_no_forward_pass_and_change_no_metric(make_trainer, dataset):
    def evaluate(writer):
        trainer = make_trainer(writer)
        calls = []
        trainer.model.register_forward_hook(lambda *args: calls.append(1))
        metrics = trainer.evaluate()
        return {name: value for name, value in metrics.items() if "loss" in name or "iou" in name}, len(calls)

    writer = Writer()
    assert evaluate(writer) == evaluate(None)
    assert len(writer.images) == 4


@pytest.mark.parametrize("arguments", [{"report_pictures": 0}, {"prediction_loss_only": True}])
def test_no_pictures_where_they_are_not_asked_for(make_trainer, arguments):
    writer = Writer()
    make_trainer(writer, **arguments).evaluate()
    assert not writer.images
    with pytest.raises(ValueError, match="report_pictures must not be negative, got -1"):
        make_trainer(report_pictures=-1)


def test_only_the_first_process_draws(make_trainer):
    writer = Writer()
    trainer = make_trainer(writer)
    trainer.state.is_world_process_zero = False
    trainer.evaluate()
    assert not writer.images


def test_streams_and_transforms_are_evaluated_without_pictures(make_trainer, dataset, caplog):
    caplog.set_level("INFO", logger="epmvg_hf")
    writer = Writer()
    expected = make_trainer().evaluate()["eval_mean_iou"]
    for evaluated in (dataset.to_iterable_dataset(), dataset.with_transform(lambda rows: rows)):
        caplog.clear()
        metrics = make_trainer(writer, evaluated).evaluate()
        assert metrics["eval_mean_iou"] == pytest.approx(expected)
        assert "no pictures of predictions on data that is streamed or transformed" in caplog.text
    assert not writer.images


def test_every_evaluation_set_has_pictures_of_its_own(make_trainer, dataset):
    writer = Writer()
    sets = {"a": dataset.select(range(3)), "b": dataset.select(range(8, 12)).with_format("torch")}
    make_trainer(writer, sets, report_pictures=2).evaluate()
    assert [name for name, _ in writer.images] == [
        *(f"eval/a_predictions/row_{row}" for row in (0, 2)),
        *(f"eval/b_predictions/row_{row}" for row in (0, 3)),
    ]


def test_what_is_predicted_or_evaluated_besides_changes_no_picture(make_trainer, dataset):
    class Besides(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            if "eval_runtime" in metrics:
                trainer.predict(dataset.select([9]))
                trainer.evaluate(dataset.select([17]), metric_key_prefix="eval_besides")

    writer = Writer()
    trainer = make_trainer(writer, dataset.select(range(8)), report_pictures=1)
    trainer.callback_handler.callbacks.insert(0, Besides())
    trainer.predict(dataset.select([9]))
    assert not writer.images
    trainer.evaluate()
    predictions = make_trainer().predict(dataset).predictions
    assert list(writer.images) == [("eval/besides_predictions/row_0", 0), ("eval/predictions/row_0", 0)]
    for picture, row in zip(writer.images.values(), (17, 0), strict=True):
        _check_picture(picture, dataset[row], predictions[row])


def test_rows_without_boxes(make_trainer, dataset):
    writer = Writer()
    make_trainer(writer, dataset.remove_columns("box")).evaluate()
    assert len(writer.images) == 4
    green, orange = map(ImageColor.getrgb, (TRUE_COLOUR, PREDICTED_COLOUR))
    for picture in writer.images.values():
        assert not (picture == green).all(axis=-1).any() and (picture == orange).all(axis=-1).any()

    # Where some rows have a box, those are shown.
    some = dataset.map(lambda row, index: {"box": row["box"] if index in (5, 30) else None}, with_indices=True)
    writer = Writer()
    make_trainer(writer, some).evaluate()
    assert [name for name, _ in writer.images] == ["eval/predictions/row_5", "eval/predictions/row_30"]
    assert all((picture == green).all(axis=-1).any() for picture in writer.images.values())


def _evaluated(count: int, **changes) -> EvaluatedRows:
    boxes = np.tile(np.float32([2, 3, 12, 14]), (count, 1))
    values = {"references": boxes, "has_box": np.ones(count, bool), "is_absent": np.zeros(count, bool)}
    return EvaluatedRows(**{"predictions": boxes + 5, "scores": None, "losses": {}, **values, **changes})


def test_labels_and_captions(monkeypatch):
    drawn, captions = [], []

    def draw_boxes(image, boxes, labels, colours):
        drawn.append(dict(zip(labels, (np.round(box / IMAGE_SIDE * 42, 1).tolist() for box in boxes), strict=True)))
        return image

    def add_caption(picture, caption):
        captions.append(caption)
        return picture

    monkeypatch.setattr(prediction_pictures, "draw_boxes", draw_boxes)
    monkeypatch.setattr(prediction_pictures, "_add_caption", add_caption)
    groups = ImageGroups(coloured_rows(["aa", "bb", "aa"]))  # 42 pixels wide, and rows 0 and 2 share an image
    draw_predictions(groups, _evaluated(3), 3)
    assert drawn == [{"true": [2, 3, 12, 14], "predicted": [7, 8, 17, 19]}] * 3
    assert captions == ["the dog", "the dog left", "the dog left left"]
    drawn.clear()
    captions.clear()
    absent = np.array([True, False, False])
    draw_predictions(groups, _evaluated(3, scores=np.float32([0.126, 1, 0]), has_box=~absent, is_absent=absent), 2)
    assert [list(boxes) for boxes in drawn] == [["0.13"], ["true", "0.00"]]
    assert captions == ["the dog (absent)", "the dog left left"]


@pytest.mark.parametrize("size", [(3, 2), (40, 3000), (3000, 40)])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_images_of_every_size_and_mode(size, mode):
    file = io.BytesIO()
    Image.new(mode, size, 100).save(file, format="PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}], "expression": ["word " * 200], "box": [[0, 0, 1, 1]]}
    (picture,) = draw_predictions(ImageGroups(Dataset.from_dict(rows)), _evaluated(1), count=4)
    width = round(size[0] * IMAGE_SIDE / max(size))
    height = round(size[1] * IMAGE_SIDE / max(size))
    assert picture.image.mode == "RGB" and picture.image.width == width
    # At most four lines of the expression lie below the image.
    assert height + 20 < picture.image.height < height + 120


def test_a_dataset_without_rows_has_no_pictures(dataset):
    none = EvaluatedRows.merge([])
    assert draw_predictions(ImageGroups(dataset.select([])), none, 4) == []


# Reporters that are no dependencies ---------------------------------------------------------------------------------


def _train(make_trainer, dataset, **arguments) -> np.ndarray:
    """Trains two steps, and returns the boxes of the evaluation after the second."""
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1, report_pictures=2, **arguments)
    trainer.train()
    return make_trainer(model=trainer.model).predict(dataset).predictions


def test_tensorboard(make_trainer, dataset, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    boxes = _train(make_trainer, dataset, report_to="tensorboard")
    (file,) = tmp_path.glob("runs/*/events*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    assert events.Tags()["images"] == ["eval/predictions/row_0", "eval/predictions/row_47"]
    for row in (0, 47):
        images = events.Images(f"eval/predictions/row_{row}")
        assert [image.step for image in images] == [1, 2]
        picture = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB"))
        _check_picture(picture, dataset[row], boxes[row])


def test_wandb(make_trainer, dataset, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        boxes = _train(make_trainer, dataset, report_to="wandb")
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    for row in (0, 47):
        found = dict(summary[f"eval/predictions/row_{row}"])
        assert found["caption"] == dataset[row]["expression"] and summary["train/global_step"] == 2
        (path,) = tmp_path.glob(f"wandb/offline-run-*/files/{found['path']}")
        _check_picture(np.asarray(Image.open(path).convert("RGB")), dataset[row], boxes[row])


def test_trackio(make_trainer, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read with the import
    trackio = pytest.importorskip("trackio")
    boxes = _train(make_trainer, dataset, report_to="trackio", project="pictures")
    (run,) = trackio.Api().runs("pictures")
    (*_, last) = (
        log for log in trackio.SQLiteStorage.get_logs("pictures", run.name) if "eval/predictions/row_0" in log
    )
    assert last["train/global_step"] == 2
    for row in (0, 47):
        found = last[f"eval/predictions/row_{row}"]
        assert found["caption"] == dataset[row]["expression"]
        path = tmp_path / "trackio" / "media" / found["file_path"]
        _check_picture(np.asarray(Image.open(path).convert("RGB")), dataset[row], boxes[row])
