"""Accuracy of predicted boxes on one split, with its uncertainty, under the protocols that papers use."""

from collections.abc import Sequence

import numpy as np

from .grounding_accuracy import paired_iou

THRESHOLD = 0.5
NUM_RESAMPLES = 2_000


def evaluate_boxes(
    predictions: np.ndarray,
    references: np.ndarray,
    image_ids: Sequence[str],
    all_references: Sequence[Sequence[Sequence[float]]] | None = None,
) -> dict[str, float | int | list[float]]:
    """
    Acc@0.5 of N expressions with a 95 % interval, and the mean IoU.

    Args:
        predictions (`np.ndarray` of shape `(N, 4)`): predicted boxes, xyxy in any unit.
        references (`np.ndarray` of shape `(N, 4)`): true boxes in that unit.
        image_ids (`Sequence[str]`): the image of each expression.
        all_references (`Sequence` of N sequences of boxes, *optional*):
            Every box of each expression, for the any-box protocol of Flickr30K Entities (MDETR, Kamath et al. 2021):
            right is what has an IoU of at least 0.5 with any of them. `references` are those of the merged-box
            protocol, the smallest box around all.

    Returns:
        `dict`: `expressions` and `images` (`int`); `acc@0.5` and `mean_iou` (`float`); `acc@0.5_interval`, lower and
        upper end (`list[float]`); with `all_references` also `any_box_acc@0.5` and `any_box_acc@0.5_interval`.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation import evaluate_boxes

    >>> predictions, references = np.array([[0, 0, 9, 9], [0, 0, 9, 9]]), np.array([[0, 0, 9, 9], [5, 5, 20, 20]])
    >>> result = evaluate_boxes(predictions, references, image_ids=["a", "b"])
    >>> result["acc@0.5"], result["acc@0.5_interval"]  # of two images no more can be said
    (0.5, [0.0, 1.0])
    ```
    """
    iou = paired_iou(np.asarray(predictions, np.float64), np.asarray(references, np.float64))
    right = iou >= THRESHOLD
    result: dict[str, float | int | list[float]] = {
        "expressions": len(right),
        "images": len(set(image_ids)),
        "acc@0.5": float(right.mean()),
        "acc@0.5_interval": bootstrap_interval(right, image_ids),
        "mean_iou": float(iou.mean()),
    }
    if all_references is not None:
        counts = [len(boxes) for boxes in all_references]
        every_iou = paired_iou(np.repeat(predictions, counts, axis=0), np.concatenate(all_references))
        starts = np.cumsum([0, *counts[:-1]])
        right = np.maximum.reduceat(every_iou, starts) >= THRESHOLD
        result["any_box_acc@0.5"] = float(right.mean())
        result["any_box_acc@0.5_interval"] = bootstrap_interval(right, image_ids)
    return result


def bootstrap_interval(
    values: np.ndarray, image_ids: Sequence[str], level: float = 0.95, num_resamples: int = NUM_RESAMPLES
) -> list[float]:
    """
    Percentile interval of a mean over expressions when *images* are drawn anew (cluster bootstrap; Efron & Tibshirani
    1993, ch. 8 and 13): expressions of one image are right and wrong together, so to draw expressions would make the
    interval too narrow.

    Args:
        values (`np.ndarray` of shape `(N,)`): a number or truth value per expression.
        image_ids (`Sequence[str]`): the image of each.
        level (`float`, *optional*, defaults to 0.95): the share of resamples within the interval.
        num_resamples (`int`, *optional*, defaults to 2000): how many resamples; they are the same at every call.

    Returns:
        `list[float]`: Lower and upper end.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation import bootstrap_interval

    >>> bootstrap_interval(np.array([True, False, True]), image_ids=["a", "a", "b"])
    [0.5, 1.0]
    ```
    """
    images, image_index = np.unique(np.asarray(image_ids), return_inverse=True)
    sums = np.bincount(image_index, weights=values, minlength=len(images))
    counts = np.bincount(image_index, minlength=len(images))
    rng = np.random.default_rng(0)
    means = np.empty(num_resamples)
    for resample in range(num_resamples):  # one at a time: all at once would need images x resamples numbers
        drawn = rng.integers(len(images), size=len(images))
        means[resample] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail]).tolist()
