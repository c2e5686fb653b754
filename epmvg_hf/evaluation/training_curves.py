"""A plot of how the loss fell and the accuracy rose during a training."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils import needs_extra

with needs_extra("draw_training_curves", "train"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

ACCURACY = "acc@0.5"
# With fewer points than these, each is marked: a line of one point cannot be seen.
MARKED_POINTS = 30

# The steps of a curve and the values at them.
Curve = tuple[list[int], list[float]]


def draw_training_curves(log_history: Sequence[Mapping[str, Any]], file: str | os.PathLike) -> None:
    """
    Writes a picture with two panels over the optimiser steps: on the left the training loss and its terms, and in
    dashes the loss of the evaluations; on the right the accuracy of the evaluations, the share of boxes with an IoU of
    at least 0.5 with the true one. What the log lacks is left out.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            Entries with a `step` and what was logged after it: `trainer.state.log_history`, or `log_history` in a
            `trainer_state.json`.
        file (`str` or `os.PathLike`): the picture file to write, in the format that its suffix names.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the log has neither a training loss nor an evaluation.

    Example:

    ```python
    >>> from PIL import Image
    >>> from epmvg_hf.evaluation.training_curves import draw_training_curves

    >>> log_history = [{"step": 10, "loss": 2.5, "loss_giou": 0.9}, {"step": 10, "eval_acc@0.5": 0.2}]
    >>> draw_training_curves(log_history, "curves.png")
    >>> Image.open("curves.png").size
    (1100, 500)
    ```
    """
    curves = _read_curves(log_history)
    losses = {name: curve for name, curve in curves.items() if name == "loss" or name.startswith("loss_")}
    evaluated = {name: curve for name, curve in curves.items() if name.startswith("eval_")}
    evaluation_losses = {name: curve for name, curve in evaluated.items() if name.endswith("_loss")}
    accuracies = {name: curve for name, curve in evaluated.items() if name.endswith(f"_{ACCURACY}")}
    if not losses and not evaluation_losses and not accuracies:
        raise ValueError(
            f"log_history has {len(log_history)} entries and none with loss, eval_loss or eval_{ACCURACY}: expected "
            "the log of a training"
        )
    # pyplot would keep the figure in a list that all threads share.
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for name, curve in losses.items():
        _plot(left, name, curve, color="black" if name == "loss" else None)
    for name, curve in evaluation_losses.items():
        _plot(left, name, curve, color="black" if name == "eval_loss" else None, linestyle="--")
    for name, curve in accuracies.items():
        _plot(right, name, curve)
    left.set(title="loss and its terms", ylabel="mean over the expressions")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(title="evaluations", ylabel="accuracy (share of boxes that are right)", ylim=(0, 1))
    for axis in (left, right):
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=100)


def _read_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curve of each number in the log, by its name."""
    points: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for name, value in entry.items():
            # A second evaluation at a step comes after the training, perhaps of the best weights, which are older.
            points.setdefault(name, {}).setdefault(entry["step"], value)
    return {name: (list(values), list(values.values())) for name, values in points.items()}


def _plot(axis: Axes, name: str, curve: Curve, **style: Any) -> None:
    steps, values = curve
    axis.plot(steps, values, label=name, marker="o" if len(steps) < MARKED_POINTS else "", markersize=3, **style)
