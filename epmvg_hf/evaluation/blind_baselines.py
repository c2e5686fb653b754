"""Predictors without eyes: what boxes can be had without looking at any image, so that an accuracy means something."""

from collections import defaultdict

import numpy as np
import torch
from datasets import Dataset, Image
from torchvision.ops import box_iou

from .accuracy import paired_iou

# Enough boxes to choose among and to choose by; more move the result by less than its sampling error.
_CANDIDATES = 1_000
_SAMPLE = 10_000
# A box fitted to fewer boxes than this says more about those than about the word.
_MIN_BOXES = 5


def blind_accuracy(train_dataset: Dataset, eval_dataset: Dataset, threshold: float = 0.5) -> dict[str, float]:
    """
    Acc@`threshold` of three predictors that never see an image. Boxes are fitted on the training rows, relative to
    the image's size.

    Args:
        train_dataset (`datasets.Dataset`): rows with `image`, `image_id`, `expression`, `box`, to fit on.
        eval_dataset (`datasets.Dataset`): likewise, to measure on.
        threshold (`float`, *optional*, defaults to 0.5): IoU from which a box counts as right.

    Returns:
        `dict[str, float]`: `whole_image`, `best_constant_box`, and `best_box_per_expression`, which falls back on the
        expression's last word, then on the constant box, where the training rows have too few of the same.

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
    by_key = defaultdict(list)
    for row, expression in enumerate(train_expressions):
        by_key[expression].append(row)
        by_key["last word", expression.split()[-1]].append(row)

    constant = _best_box(train_boxes, threshold)
    fitted = {}
    predicted = np.empty_like(true_boxes)
    for row, expression in enumerate(eval_dataset["expression"]):
        keys = (expression.lower(), ("last word", expression.lower().split()[-1]))
        key = next((key for key in keys if len(by_key.get(key, ())) >= _MIN_BOXES), None)
        if key is not None and key not in fitted:
            fitted[key] = _best_box(train_boxes[by_key[key]], threshold)
        predicted[row] = constant if key is None else fitted[key]

    def accuracy(boxes: np.ndarray) -> float:
        return float((paired_iou(boxes, true_boxes) >= threshold).mean())

    return {
        "whole_image": accuracy(np.broadcast_to(np.array([0.0, 0.0, 1.0, 1.0]), true_boxes.shape)),
        "best_constant_box": accuracy(np.broadcast_to(constant, true_boxes.shape)),
        "best_box_per_expression": accuracy(predicted),
    }


def _relative_boxes(dataset: Dataset) -> np.ndarray:
    """Boxes `(rows, 4)` as shares of their image's width and height; only the images' headers are read."""
    undecoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    sizes = {}
    for row, image_id in enumerate(dataset["image_id"]):
        if image_id not in sizes:
            sizes[image_id] = Image().decode_example(undecoded[row]["image"]).size
    scale = np.array([sizes[image_id] * 2 for image_id in dataset["image_id"]], np.float64)
    return np.array(dataset["box"], np.float64) / scale


def _best_box(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """The one of these boxes, or the whole image, that is right for the largest share of them."""
    rng = np.random.default_rng(0)
    candidates = boxes if len(boxes) <= _CANDIDATES else rng.choice(boxes, _CANDIDATES, replace=False)
    candidates = np.concatenate([candidates, [[0.0, 0.0, 1.0, 1.0]]])
    sample = boxes if len(boxes) <= _SAMPLE else rng.choice(boxes, _SAMPLE, replace=False)
    right = box_iou(torch.from_numpy(candidates), torch.from_numpy(sample)) >= threshold
    return candidates[int(right.sum(1).argmax())]
