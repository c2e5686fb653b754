"""
Baselines that never look at the image.

Boxes and words of a benchmark are not evenly distributed, so a guess without the image is sometimes right. Only as far
as a model is better than these baselines has it learned to look at the image.
"""

from collections import defaultdict

import numpy as np
import torch
from datasets import Dataset, Image
from torchvision.ops import box_iou

from ..data.files.image_files import measure_stored
from .accuracy import find_boxes, paired_iou

# At most this many training boxes are tried as the fitted box, and at most this many are used to compare them. More
# would change the accuracy by less than its sampling error.
_MAX_CANDIDATES = 1_000
_MAX_COMPARED = 10_000

# With fewer boxes of an expression than this, the fitted box would depend on the single boxes more than on the words.
_MIN_BOXES = 5


def blind_accuracy(train_dataset: Dataset, eval_dataset: Dataset, threshold: float = 0.5) -> dict[str, float]:
    """
    Accuracy of three baselines that predict a box without the image. The boxes are fitted to the training rows, as
    fractions of the image's width and height. Rows without a box do not count. The rows are those that are stored,
    without what `set_transform` makes of them.

    Args:
        train_dataset (`datasets.Dataset`): rows with `image`, `expression` and `box`, to fit the boxes to.
        eval_dataset (`datasets.Dataset`): rows with the same columns, to measure the accuracy on.
        threshold (`float`, *optional*, defaults to 0.5): the IoU from which a box is right.

    Returns:
        `dict[str, float]`: the accuracy in [0, 1] of predicting the `whole_image`, the `best_constant_box`, and the
        `best_box_per_expression`. Where the training rows have fewer than five boxes of an expression, the last is
        fitted to the expressions with the same last word, and if these are too few, it is the constant box.

    Raises:
        `ValueError`: No row of a dataset has a box, or a row with a box has no image.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.blind_baselines import blind_accuracy

    >>> accuracy = blind_accuracy(dataset, dataset)
    >>> list(accuracy), accuracy["whole_image"]
    (['whole_image', 'best_constant_box', 'best_box_per_expression'], 0.0)
    ```
    """
    train_boxes, train_expressions = _read_rows(train_dataset, "training data")
    true_boxes, expressions = _read_rows(eval_dataset, "evaluation data")
    rows_by_key: defaultdict[str | tuple[str, str], list[int]] = defaultdict(list)
    for row, expression in enumerate(train_expressions):
        rows_by_key[expression].append(row)
        rows_by_key["last word", expression.split()[-1]].append(row)

    constant = _best_box(train_boxes, threshold)
    fitted: dict[str | tuple[str, str], np.ndarray] = {}
    predicted = np.empty_like(true_boxes)
    for row, expression in enumerate(expressions):
        keys = (expression, ("last word", expression.split()[-1]))
        key = next((key for key in keys if len(rows_by_key.get(key, ())) >= _MIN_BOXES), None)
        if key is not None and key not in fitted:
            fitted[key] = _best_box(train_boxes[rows_by_key[key]], threshold)
        predicted[row] = constant if key is None else fitted[key]

    def accuracy(boxes: np.ndarray) -> float:
        return float((paired_iou(boxes, true_boxes) >= threshold).mean())

    return {
        "whole_image": accuracy(np.broadcast_to(np.array([0.0, 0.0, 1.0, 1.0]), true_boxes.shape)),
        "best_constant_box": accuracy(np.broadcast_to(constant, true_boxes.shape)),
        "best_box_per_expression": accuracy(predicted),
    }


def _read_rows(dataset: Dataset, name: str) -> tuple[np.ndarray, list[str]]:
    """
    The rows that have a box: boxes `(N, 4)` as fractions of their image's width and height, and expressions in lower
    case. Only the headers of the images are read, and a file that several rows name is read once.
    """
    stored = dataset.with_format(None).cast_column("image", Image(decode=False))
    boxes, has_box = find_boxes(stored["box"], name)
    rows = np.flatnonzero(has_box)
    sizes = []
    size_of_path: dict[str | None, tuple[int, int]] = {}
    for row, image in zip(rows, stored.select(rows)["image"], strict=True):
        if image is None:
            raise ValueError(f"row {row} of the {name} has no image, whose size its box needs.")
        path = image["path"] if image["bytes"] is None else None
        size = size_of_path.get(path) or measure_stored(image) or Image().decode_example(image).size
        if path is not None:
            size_of_path[path] = size
        sizes.append(size)
    scale = np.tile(np.array(sizes, np.float64), 2)
    return boxes[rows] / scale, [expression.lower() for expression in stored.select(rows)["expression"]]


def _best_box(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """The box, among these and the whole image, whose IoU with as many of these as possible reaches the threshold."""
    rng = np.random.default_rng(0)
    candidates = boxes if len(boxes) <= _MAX_CANDIDATES else rng.choice(boxes, _MAX_CANDIDATES, replace=False)
    candidates = np.concatenate([candidates, [[0.0, 0.0, 1.0, 1.0]]])
    compared = boxes if len(boxes) <= _MAX_COMPARED else rng.choice(boxes, _MAX_COMPARED, replace=False)
    is_right = box_iou(torch.from_numpy(candidates), torch.from_numpy(compared)) >= threshold
    return candidates[int(is_right.sum(1).argmax())]
