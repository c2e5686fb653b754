"""Accuracy of visual grounding as an `evaluate` metric; `evaluate.load` also takes this file's path, offline."""

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
    >>> from epmvg_hf.grounding_accuracy import paired_iou

    >>> paired_iou(np.array([[0, 0, 10, 10], [0, 0, 5, 5]]), np.array([[0, 0, 10, 6], [5, 5, 9, 9]]))
    array([0.6, 0. ])
    ```
    """
    overlap = np.minimum(boxes[:, 2:], references[:, 2:]) - np.maximum(boxes[:, :2], references[:, :2])
    intersection = overlap.clip(min=0).prod(-1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (references[:, 2:] - references[:, :2]).prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros(len(union)), where=union > 0)
