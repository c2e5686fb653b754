"""Accuracy of visual grounding as an `evaluate` metric; `evaluate.load` also takes this file's path, offline."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Share of expressions whose predicted box has an IoU of at least a threshold with the true box (`acc@0.5`, `acc@0.7`),
and the mean IoU. Boxes are continuous: width is x2 - x1, without the +1 of inclusive pixels.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: boxes (x1, y1, x2, y2), one per expression.
    references: true boxes, likewise, in the same units.
Returns:
    acc@0.5, acc@0.7 and mean_iou, each in [0, 1].
"""

_CITATION = """
@inproceedings{kazemzadeh2014referitgame,
  title={ReferItGame: Referring to Objects in Photographs of Natural Scenes},
  author={Kazemzadeh, Sahar and Ordonez, Vicente and Matten, Mark and Berg, Tamara},
  booktitle={EMNLP}, year={2014}
}
"""

_THRESHOLDS = (0.5, 0.7)


class GroundingAccuracy(evaluate.Metric):
    """
    `acc@0.5`, `acc@0.7` and `mean_iou` of predicted boxes; every prediction counts once.

    `compute(predictions=..., references=...)` takes boxes (x1, y1, x2, y2), one per expression, both in one unit, and
    gives shares in [0, 1]; a `ValueError` if they differ in number.

    Example:

    ```python
    >>> from epmvg_hf import GroundingAccuracy

    >>> metric = GroundingAccuracy(keep_in_memory=True)
    >>> metric.compute(predictions=[[0, 0, 10, 10]], references=[[0, 0, 10, 6]])
    {'acc@0.5': 1.0, 'acc@0.7': 0.0, 'mean_iou': 0.6}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.List(datasets.Value("float64"), length=4)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": box, "references": box}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        iou = paired_iou(np.asarray(predictions, np.float64), np.asarray(references, np.float64))
        scores = {f"acc@{threshold}": float((iou >= threshold).mean()) for threshold in _THRESHOLDS}
        return {**scores, "mean_iou": float(iou.mean())}


def paired_iou(boxes: np.ndarray, references: np.ndarray) -> np.ndarray:
    """
    IoU of every box with its own reference (torchvision's `box_iou` compares all with all).

    Args:
        boxes (`np.ndarray` of shape `(N, 4)`): (x1, y1, x2, y2).
        references (`np.ndarray` of shape `(N, 4)`): likewise.

    Returns:
        `np.ndarray` of shape `(N,)`; 0 where both boxes are empty.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation.accuracy import paired_iou

    >>> paired_iou(np.array([[0, 0, 10, 10], [0, 0, 5, 5]]), np.array([[0, 0, 10, 6], [5, 5, 9, 9]]))
    array([0.6, 0. ])
    ```
    """
    overlap = np.minimum(boxes[:, 2:], references[:, 2:]) - np.maximum(boxes[:, :2], references[:, :2])
    intersection = overlap.clip(min=0).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (references[:, 2:] - references[:, :2]).prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros(len(union)), where=union > 0)


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
    >>> from epmvg_hf.evaluation.accuracy import evaluate_boxes

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
    >>> from epmvg_hf.evaluation.accuracy import bootstrap_interval

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
