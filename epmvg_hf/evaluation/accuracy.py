"""
Accuracy of predicted boxes, with its uncertainty.

`evaluate.load` also takes the path of this file, without a network, so it imports nothing from the package.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Fraction of expressions whose predicted box has an IoU of at least 0.5 or 0.7 with the true box (`acc@0.5`, `acc@0.7`),
and the mean IoU. Boxes are continuous: the width is x2 - x1, without the +1 of inclusive pixel coordinates.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted boxes (x1, y1, x2, y2), one per expression.
    references: true boxes (x1, y1, x2, y2) in the same order and unit.
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


class GroundingAccuracy(evaluate.Metric):
    """
    The metric `acc@0.5`, `acc@0.7` and `mean_iou` for the `evaluate` library.

    `compute(predictions=..., references=...)` takes boxes (x1, y1, x2, y2), one per expression and all in the same
    unit, and returns fractions in [0, 1]. It raises a `ValueError` if their numbers differ.

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
        scores = {f"acc@{threshold}": float((iou >= threshold).mean()) for threshold in (0.5, 0.7)}
        return {**scores, "mean_iou": float(iou.mean())}


def evaluate_boxes(
    predictions: np.ndarray,
    references: np.ndarray,
    image_ids: Sequence[str],
    all_references: Sequence[Sequence[Sequence[float]]] | None = None,
) -> dict[str, float | int | list[float]]:
    """
    Acc@0.5 of N expressions with its 95 % confidence interval, and the mean IoU.

    Args:
        predictions (`np.ndarray` of shape `(N, 4)`): predicted boxes (x1, y1, x2, y2).
        references (`np.ndarray` of shape `(N, 4)`): true boxes in the same unit.
        image_ids (`Sequence[str]`): the image of each expression.
        all_references (`Sequence` of N sequences of boxes, *optional*):
            All true boxes of each expression, for the any-box protocol of Flickr30K Entities (MDETR, Kamath et al.
            2021), in which a prediction is right if its IoU with any of them is at least 0.5. `references` are then
            the boxes of the merged-box protocol, each the smallest box around all of them.

    Returns:
        `dict`: `expressions` and `images` (`int`), the numbers of both; `acc@0.5` and `mean_iou` (`float`);
        `acc@0.5_interval` (`list[float]`), the lower and upper end; with `all_references` also `any_box_acc@0.5` and
        `any_box_acc@0.5_interval`.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation.accuracy import evaluate_boxes

    >>> predictions, references = np.array([[0, 0, 9, 9], [0, 0, 9, 9]]), np.array([[0, 0, 9, 9], [5, 5, 20, 20]])
    >>> result = evaluate_boxes(predictions, references, image_ids=["a", "b"])
    >>> result["acc@0.5"], result["acc@0.5_interval"]  # with two images, no narrower interval is possible
    (0.5, [0.0, 1.0])
    ```
    """
    iou = paired_iou(np.asarray(predictions, np.float64), np.asarray(references, np.float64))
    is_right = iou >= 0.5
    result: dict[str, float | int | list[float]] = {
        "expressions": len(iou),
        "images": len(set(image_ids)),
        "acc@0.5": float(is_right.mean()),
        "acc@0.5_interval": bootstrap_interval(is_right, image_ids),
        "mean_iou": float(iou.mean()),
    }
    if all_references is not None:
        counts = [len(boxes) for boxes in all_references]
        iou_of_every_box = paired_iou(np.repeat(predictions, counts, axis=0), np.concatenate(all_references))
        first_boxes = np.cumsum([0, *counts[:-1]])
        is_right = np.maximum.reduceat(iou_of_every_box, first_boxes) >= 0.5
        result["any_box_acc@0.5"] = float(is_right.mean())
        result["any_box_acc@0.5_interval"] = bootstrap_interval(is_right, image_ids)
    return result


def paired_iou(boxes: np.ndarray, references: np.ndarray) -> np.ndarray:
    """
    IoU of each box with the reference in the same row. (`box_iou` of torchvision compares every box with every one.)

    Args:
        boxes (`np.ndarray` of shape `(N, 4)`): boxes (x1, y1, x2, y2).
        references (`np.ndarray` of shape `(N, 4)`): boxes (x1, y1, x2, y2) in the same unit.

    Returns:
        `np.ndarray` of shape `(N,)`: the IoU, 0 where both boxes are empty.

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


def bootstrap_interval(
    values: np.ndarray, image_ids: Sequence[str], level: float = 0.95, num_resamples: int = 2_000
) -> list[float]:
    """
    Confidence interval of a mean over expressions, as percentiles of a cluster bootstrap (Efron & Tibshirani 1993,
    chapters 8 and 13).

    Whole images are resampled, because the expressions of one image tend to be right or wrong together. If single
    expressions were resampled, the interval would be too narrow.

    Args:
        values (`np.ndarray` of shape `(N,)`): a number or truth value per expression.
        image_ids (`Sequence[str]`): the image of each expression.
        level (`float`, *optional*, defaults to 0.95): fraction of the resamples that lie within the interval.
        num_resamples (`int`, *optional*, defaults to 2000): number of resamples, which are the same in every call.

    Returns:
        `list[float]`: the lower and upper end.

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
    for resample in range(num_resamples):  # all draws in one array would need too much memory
        drawn = rng.integers(len(images), size=len(images))
        means[resample] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail]).tolist()
