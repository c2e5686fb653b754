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

from .accuracy import paired_iou

# At most this many training boxes are tried as the fitted box, and at most this many are used to compare them. More
# would change the accuracy by less than its sampling error.
_MAX_CANDIDATES = 1_000
_MAX_COMPARED = 10_000

# With fewer boxes of an expression than this, the fitted box would depend on the single boxes more than on the words.
_MIN_BOXES = 5


def blind_accuracy(train_dataset: Dataset, eval_dataset: Dataset, threshold: float = 0.5) -> dict[str, float]:
    """
    Accuracy of three baselines that predict a box without the image. The boxes are fitted to the training rows, as
    fractions of the image's width and height.

    Args:
        train_dataset (`datasets.Dataset`): rows with `image`, `image_id`, `expression` and `box`, to fit the boxes to.
        eval_dataset (`datasets.Dataset`): rows with the same columns, to measure the accuracy on.
        threshold (`float`, *optional*, defaults to 0.5): the IoU from which a box is right.

    Returns:
        `dict[str, float]`: the accuracy in [0, 1] of predicting the `whole_image`, the `best_constant_box`, and the
        `best_box_per_expression`. Where the training rows have fewer than five boxes of an expression, the last is
        fitted to the expressions with the same last word, and if these are too few, it is the constant box.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.blind_baselines import blind_accuracy

    >>> accuracy = blind_accuracy(dataset, dataset)
    >>> list(accuracy), accuracy["whole_image"]
    (['whole_image', 'best_constant_box', 'best_box_per_expression'], 0.0)
    ```
    """
    train_boxes, true_boxes = _relative_boxes(train_dataset), _relative_boxes(eval_dataset)
    train_expressions = [expression.lower() for expression in train_dataset["expression"]]
    rows_by_key = defaultdict(list)
    for row, expression in enumerate(train_expressions):
        rows_by_key[expression].append(row)
        rows_by_key["last word", expression.split()[-1]].append(row)

    constant = _best_box(train_boxes, threshold)
    fitted = {}
    predicted = np.empty_like(true_boxes)
    for row, expression in enumerate(eval_dataset["expression"]):
        keys = (expression.lower(), ("last word", expression.lower().split()[-1]))
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


def _relative_boxes(dataset: Dataset) -> np.ndarray:
    """Boxes `(N, 4)` as fractions of their image's width and height. Only the headers of the images are read."""
    undecoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    sizes = {}
    for row, image_id in enumerate(dataset["image_id"]):
        if image_id not in sizes:
            sizes[image_id] = Image().decode_example(undecoded[row]["image"]).size
    scale = np.array([sizes[image_id] * 2 for image_id in dataset["image_id"]], np.float64)
    return np.array(dataset["box"], np.float64) / scale


def _best_box(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """The box, among these and the whole image, whose IoU with as many of these as possible reaches the threshold."""
    rng = np.random.default_rng(0)
    candidates = boxes if len(boxes) <= _MAX_CANDIDATES else rng.choice(boxes, _MAX_CANDIDATES, replace=False)
    candidates = np.concatenate([candidates, [[0.0, 0.0, 1.0, 1.0]]])
    compared = boxes if len(boxes) <= _MAX_COMPARED else rng.choice(boxes, _MAX_COMPARED, replace=False)
    is_right = box_iou(torch.from_numpy(candidates), torch.from_numpy(compared)) >= threshold
    return candidates[int(is_right.sum(1).argmax())]
