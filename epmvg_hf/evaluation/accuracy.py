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
Expressions without a true box do not count.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted boxes (x1, y1, x2, y2), one per expression.
    references: true boxes (x1, y1, x2, y2) in the same order and unit; None or four times NaN where there is none.
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
    unit, and returns fractions in [0, 1]. Expressions without a true box, whose reference is `None` or four times NaN,
    do not count. It raises a `ValueError` if the numbers of predictions and references differ, or if no reference is a
    box.

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
        true_boxes, has_box = find_boxes(references, "references")
        iou = paired_iou(np.asarray(predictions, np.float64)[has_box], true_boxes[has_box])
        scores = {f"acc@{threshold}": float((iou >= threshold).mean()) for threshold in (0.5, 0.7)}
        return {**scores, "mean_iou": float(iou.mean())}


def evaluate_boxes(
    predictions: np.ndarray | Sequence[Sequence[float]],
    references: np.ndarray | Sequence[Sequence[float] | None],
    image_ids: Sequence[str],
    all_references: Sequence[Sequence[Sequence[float]]] | None = None,
) -> dict[str, float | int | list[float]]:
    """
    Acc@0.5 of N expressions with its 95 % confidence interval, and the mean IoU. Expressions without a true box do not
    count.

    Args:
        predictions (`np.ndarray` of shape `(N, 4)`): predicted boxes (x1, y1, x2, y2).
        references (`np.ndarray` of shape `(N, 4)` or `Sequence`):
            True boxes in the same unit; four times NaN, or `None`, where there is none.
        image_ids (`Sequence[str]`): the image of each expression.
        all_references (`Sequence` of N sequences of boxes, *optional*):
            All true boxes of each expression, for the any-box protocol of Flickr30K Entities (MDETR, Kamath et al.
            2021), in which a prediction is right if its IoU with any of them is at least 0.5. `references` are then
            the boxes of the merged-box protocol, each the smallest box around all of them.

    Returns:
        `dict`: `expressions` and `images` (`int`), how many there are with a true box; `acc@0.5` and `mean_iou`
        (`float`); `acc@0.5_interval` (`list[float]`), the lower and upper end; with `all_references` also
        `any_box_acc@0.5` and `any_box_acc@0.5_interval`.

    Raises:
        `ValueError`: No expression has a true box, a box is not four finite numbers, the arguments differ in length,
            or an expression with a true box has none in `all_references`.

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
    if not len(predictions) == len(references) == len(image_ids):
        lengths = f"{len(predictions)} predictions, {len(references)} references and {len(image_ids)} image_ids"
        raise ValueError(f"there are {lengths}, expected equally many.")
    true_boxes, has_box = find_boxes(references, "references")
    predicted_boxes = np.asarray(predictions, np.float64)[has_box]
    image_ids = np.asarray(image_ids)[has_box]
    iou = paired_iou(predicted_boxes, true_boxes[has_box])
    is_right = iou >= 0.5
    result: dict[str, float | int | list[float]] = {
        "expressions": len(iou),
        "images": len(set(image_ids)),
        "acc@0.5": float(is_right.mean()),
        "acc@0.5_interval": bootstrap_interval(is_right, image_ids),
        "mean_iou": float(iou.mean()),
    }
    if all_references is not None:
        every_box = {row: all_references[row] for row in np.flatnonzero(has_box).tolist()}
        if empty := [row for row, boxes in every_box.items() if len(boxes) == 0]:
            raise ValueError(f"all_references[{empty[0]}] is empty although references[{empty[0]}] is a box.")
        counts = [len(boxes) for boxes in every_box.values()]
        repeated = np.repeat(predicted_boxes, counts, axis=0)
        iou_of_every_box = paired_iou(repeated, np.concatenate([*every_box.values()]))
        first_boxes = np.cumsum([0, *counts[:-1]])
        is_right = np.maximum.reduceat(iou_of_every_box, first_boxes) >= 0.5
        result["any_box_acc@0.5"] = float(is_right.mean())
        result["any_box_acc@0.5_interval"] = bootstrap_interval(is_right, image_ids)
    return result


def find_boxes(boxes: np.ndarray | Sequence[Sequence[float] | None], name: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Tells apart rows with and without a box.

    Args:
        boxes (`np.ndarray` of shape `(N, 4)` or `Sequence`): boxes; `None` or four times NaN where there is none.
        name (`str`): what errors call the rows.

    Returns:
        `tuple`: the boxes as one `np.ndarray` of shape `(N, 4)`, and one of truth values of shape `(N,)`.

    Raises:
        `ValueError`: No row has a box, or one has neither four finite numbers nor four times NaN.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.accuracy import find_boxes

    >>> boxes, has_box = find_boxes([[0, 0, 10, 6], None], name="training data")
    >>> has_box
    array([ True, False])
    ```
    """
    rows = np.array([[np.nan] * 4 if box is None else box for box in boxes], np.float64).reshape(-1, 4)
    has_box = np.asarray(np.isfinite(rows).all(-1))
    broken = np.flatnonzero(~has_box & ~np.isnan(rows).all(-1))
    if len(broken):
        row = broken[0]
        raise ValueError(f"row {row} of the {name} is {rows[row].tolist()}, expected 4 finite numbers or no box.")
    if not has_box.any():
        raise ValueError(f"none of the {len(rows)} rows of the {name} has a box, expected at least one.")
    return rows, has_box


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
