"""What a run leaves of its predictions: the accuracy by kind of expression, a file with all boxes, and pictures."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..evaluation.accuracy import find_boxes, paired_iou
from ..evaluation.accuracy_by_group import GroupAccuracy, accuracy_by_group
from ..evaluation.error_kinds import worst_first
from ..evaluation.visualization import draw_grid


def accuracy_by_kind(dataset: Dataset, predictions: np.ndarray) -> list[GroupAccuracy]:
    """The accuracy on each kind of expression, the worst first, if the dataset has kinds to tell apart."""
    if "kind" not in dataset.column_names:
        return []
    true_boxes, has_box = find_boxes(dataset["box"], "test data")
    is_right = paired_iou(predictions[has_box], true_boxes[has_box]) >= 0.5
    return accuracy_by_group(is_right, np.array(dataset["kind"])[has_box].tolist())


def write_predictions(
    path: Path, dataset: Dataset, predictions: np.ndarray, boxes: np.ndarray, scores: np.ndarray | None
) -> None:
    """
    Writes a line of JSON for each row, those with the lowest IoU first: `image_id`, `expression`, `box` and `true_box`
    (xyxy pixels), `iou` and `score`. What there is not, such as the true box of an absent expression, is null; rows
    without a true box come last.
    """
    image_ids, expressions = dataset["image_id"][:], dataset["expression"][:]
    has_box = ~np.isnan(boxes).any(-1)
    iou = np.full(len(boxes), np.nan)
    iou[has_box] = paired_iou(predictions[has_box], boxes[has_box])
    lines = []
    for row in worst_first(iou, scores):
        line = {
            "image_id": image_ids[row],
            "expression": expressions[row],
            "box": predictions[row].tolist(),
            "true_box": boxes[row].tolist() if has_box[row] else None,
            "iou": float(iou[row]) if has_box[row] else None,
            "score": None if scores is None else float(scores[row]),
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    write_whole(path, "\n".join(lines) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a whole file or leaves the one that is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw_some(path: Path, dataset: Dataset, predictions: np.ndarray, boxes: np.ndarray, count: int) -> None:
    """Draws so many of the rows that have a box, at even distances."""
    rows = np.flatnonzero(~np.isnan(boxes).any(-1))
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    draw_rows(path, dataset, chosen, predictions, boxes)


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
