"""Kinds of wrong boxes, by how the predicted box lies to the true one, and which of them to look at first."""

from collections.abc import Sequence

import numpy as np

from .accuracy import paired_iou

RIGHT = "right"

# Each kind of wrong box, which has an IoU below 0.5, with its definition, the gravest first.
ERROR_KINDS = {
    "wrong object": "IoU below 0.1, and neither box lies within the other",
    "beside": "IoU from 0.1 to 0.3, and neither box lies within the other",
    "too large": "at least 90 % of the true box lies within the predicted box",
    "too small": "at least 90 % of the predicted box lies within the true box",
    "nearly right": "IoU from 0.3 to 0.5, and neither box lies within the other",
}


def name_kinds(boxes: np.ndarray, true_boxes: np.ndarray) -> np.ndarray:
    """
    Names what is wrong with each predicted box.

    A box with an IoU of at least 0.5 is `"right"`. Any other has exactly one of the `ERROR_KINDS`: `"too large"` if at
    least 90 % of the area of the true box lies within it, `"too small"` if at least 90 % of its own area lies within
    the true box, and otherwise by its IoU `"wrong object"` below 0.1, `"beside"` below 0.3, and `"nearly right"`. Of
    an empty box, no share lies within the other.

    Args:
        boxes (`np.ndarray` of shape `(N, 4)`): predicted boxes, xyxy pixels.
        true_boxes (`np.ndarray` of shape `(N, 4)`): true boxes, xyxy pixels.

    Returns:
        `np.ndarray` of shape `(N,)` with a `str` for each box.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.evaluation.error_kinds import name_kinds

    >>> boxes = np.array([[0, 0, 100, 100], [30, 30, 60, 60], [60, 60, 90, 90]])
    >>> name_kinds(boxes, np.tile([10, 10, 50, 50], (3, 1))).tolist()
    ['too large', 'beside', 'wrong object']
    ```
    """
    overlap = np.minimum(boxes[:, 2:], true_boxes[:, 2:]) - np.maximum(boxes[:, :2], true_boxes[:, :2])
    intersection = overlap.clip(min=0).prod(-1)

    def lies_within_the_other(own: np.ndarray) -> np.ndarray:
        area = (own[:, 2:] - own[:, :2]).prod(-1)
        return (area > 0) & (intersection >= 0.9 * area)

    iou = paired_iou(boxes, true_boxes)
    # If each of the boxes lay within the other, their IoU would be over 0.8.
    conditions = [iou >= 0.5, lies_within_the_other(true_boxes), lies_within_the_other(boxes), iou < 0.1, iou < 0.3]
    names = [RIGHT, "too large", "too small", "wrong object", "beside"]
    return np.select(conditions, names, "nearly right")


def worst_first(iou: np.ndarray | Sequence[float], scores: np.ndarray | Sequence[float] | None = None) -> np.ndarray:
    """
    Orders rows by their IoU, the lowest first. Of rows with the same IoU, which is often 0, those with the highest
    score come first: there the model is wrong and sure of it.

    Args:
        iou (`np.ndarray` of shape `(N,)`): the IoU of each row; NaN where there is no true box.
        scores (`np.ndarray` of shape `(N,)`, *optional*): the score of each row.

    Returns:
        `np.ndarray` of shape `(N,)`: the numbers of the rows in this order, those with NaN at the end. What decides
        nothing leaves the order of the rows as it is.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.error_kinds import worst_first

    >>> worst_first([0.4, 0.0, 0.0], scores=[0.5, 0.1, 0.9]).tolist()
    [2, 1, 0]
    ```
    """
    iou = np.asarray(iou, np.float64)
    surest_first = np.zeros(len(iou)) if scores is None else -np.asarray(scores, np.float64)
    return np.lexsort((surest_first, iou))
