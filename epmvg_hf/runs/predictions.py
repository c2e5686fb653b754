"""What a run leaves of its predictions: the accuracy by kind of expression, a file with all boxes, and pictures."""

import json
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from ..evaluation.accuracy import find_boxes, paired_iou
from ..evaluation.accuracy_by_group import GroupAccuracy, accuracy_by_group
from ..evaluation.visualization import draw_grid

logger = logging.getLogger(__name__)


def accuracy_by_kind(dataset: Dataset, predictions: np.ndarray) -> list[GroupAccuracy]:
    """The accuracy on each kind of expression, the worst first, if the dataset has kinds to tell apart."""
    if "kind" not in dataset.column_names:
        return []
    true_boxes, has_box = find_boxes(dataset["box"], "test data")
    is_right = paired_iou(predictions[has_box], true_boxes[has_box]) >= 0.5
    return accuracy_by_group(is_right, np.array(dataset["kind"])[has_box].tolist())


def write_predictions(folder: Path, dataset: Dataset, output: PredictionOutput, picture_rows: int) -> None:
    """
    Write `predictions.jsonl` with every row, and `predictions.png` with some at even distances, of those with a box if
    there are any.
    """
    true_boxes, has_box = find_boxes(dataset["box"], "test data")
    with (folder / "predictions.jsonl").open("w") as file:
        for number, row in enumerate(dataset.remove_columns("image")):
            line = {key: row[key] for key in ("image_id", "expression")}
            true_box = true_boxes[number].tolist() if has_box[number] else None
            file.write(json.dumps({**line, "box": output.predictions[number].tolist(), "true_box": true_box}) + "\n")
    if picture_rows == 0:
        return
    shown = np.flatnonzero(has_box) if has_box.any() else np.arange(len(dataset))
    chosen = shown[np.linspace(0, len(shown) - 1, min(picture_rows, len(shown))).astype(int)]
    draw_rows(folder / "predictions.png", dataset, chosen, output.predictions, true_boxes)
    logger.info("wrote %s and predictions.jsonl", folder / "predictions.png")


def draw_rows(
    path: Path, dataset: Dataset, rows: np.ndarray, predictions: np.ndarray, true_boxes: np.ndarray, columns: int = 4
) -> None:
    """Draws the predicted and the true boxes of these rows of a dataset, so many beside each other."""
    chosen = [dataset[int(row)] for row in rows]
    draw_grid(
        path,
        images=[row["image"] for row in chosen],
        expressions=[row["expression"] for row in chosen],
        boxes=predictions[rows],
        true_boxes=true_boxes[rows],
        columns=columns,
    )
