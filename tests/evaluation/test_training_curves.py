"""Curves of a training, read back from the figure and looked at pixel by pixel."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.evaluation.training_curves import draw_training_curves
from tests.fixtures.models import ONE_STEP, tiny_model


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), savefig(self, *args, **kwargs))
    )
    return saved


def _curves(axis) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_the_curves_are_those_of_the_log(tmp_path, processor, figures):
    dataset = load_grounding_dataset("shapes", split="train", num_images=4)
    arguments = {**ONE_STEP, "max_steps": 5, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = EpmVGTrainingArguments(str(tmp_path), **arguments)
    data = {"train_dataset": dataset, "eval_dataset": dataset, "processing_class": processor}
    trainer = EpmVGTrainer(tiny_model(box_head="map"), args, **data)
    trainer.train()
    trainer.save_state()
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    draw_training_curves(log, tmp_path / "curves.png")
    left, right = map(_curves, figures[0].axes)
    terms = ("loss", "loss_bbox", "loss_giou", "loss_map")
    assert list(left) == [*terms, "eval_loss"] and list(right) == ["eval_acc@0.5"]
    for name, curve in {**left, **right}.items():
        lines = [line for line in log if name in line]
        assert curve == ([line["step"] for line in lines], [line[name] for line in lines])
        assert curve[0] == [2, 4, 5]
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    assert pixels.shape == (500, 1100, 3)
    blue = (abs(pixels - [31, 119, 180]) < 12).all(axis=-1)  # the first colour of matplotlib
    assert blue[:, :550].sum() > 100 and blue[:, 550:].sum() > 100


def test_several_evaluation_sets_and_steps_that_come_twice(tmp_path, figures):
    log = [
        {"step": 10, "eval_a_acc@0.5": 0.1, "eval_a_acc@0.7": 0.0, "eval_a_loss": 3.0},
        {"step": 10, "eval_b_acc@0.5": 0.2, "eval_b_loss_giou": 1.0},
        {"step": 20, "eval_a_acc@0.5": 0.3, "eval_a_loss": 2.0},
        {"step": 20, "train_loss": 2.5},
        {"step": 20, "eval_a_acc@0.5": 0.9, "eval_a_loss": 1.0},  # the best weights, of an earlier step
    ]
    draw_training_curves(log, str(tmp_path / "curves.svg"))
    left, right = map(_curves, figures[0].axes)
    assert left == {"eval_a_loss": ([10, 20], [3.0, 2.0])}
    assert right == {"eval_a_acc@0.5": ([10, 20], [0.1, 0.3]), "eval_b_acc@0.5": ([10], [0.2])}


@pytest.mark.parametrize("entry", [{"step": 1, "loss": 2.0}, {"step": 1, "eval_acc@0.5": 0.5}])
def test_a_single_point_is_seen(tmp_path, entry, figures):
    draw_training_curves([entry], tmp_path / "curves.png")
    (line,) = (line for axis in figures[0].axes for line in axis.lines)
    assert line.get_marker() == "o"


def test_a_log_of_no_training_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"log_history has 1 entries and none with loss, eval_loss or eval_acc@0\.5"):
        draw_training_curves([{"step": 3, "train_loss": 1.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
