"""
What the scores of boxes are worth: whether a score is the probability that its box is right, whether the better-scored
boxes are right more often, and whether scores tell expressions whose object is in the picture from those whose object
is not.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..utils import needs_extra
from .accuracy import find_boxes, paired_iou


@dataclass(frozen=True)
class ScoreBin:
    """
    The expressions whose scores lie in one interval (lower, upper]. The first interval also contains 0.

    Attributes:
        lower, upper (`float`): ends of the interval.
        count (`int`): number of expressions, at least 1.
        mean_score (`float`): mean of their scores.
        accuracy (`float`): share of them whose box is right.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.score_quality import ScoreBin

    >>> full = ScoreBin(lower=0.9, upper=1.0, count=20, mean_score=0.95, accuracy=0.75)
    >>> round(full.mean_score - full.accuracy, 2)  # these scores promise too much
    0.2
    ```
    """

    lower: float
    upper: float
    count: int
    mean_score: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """
    How far scores are from the probability that a box is right, as [`~score_quality.measure_calibration`] finds it.

    Attributes:
        error (`float`): expected calibration error in [0, 1], where 0 is best.
        bins (`list[ScoreBin]`): the intervals of scores that have expressions, in ascending order.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.score_quality import Calibration, ScoreBin

    >>> calibration = Calibration(error=0.2, bins=[ScoreBin(0.9, 1.0, count=20, mean_score=0.95, accuracy=0.75)])
    >>> sum(full.count for full in calibration.bins)
    20
    ```
    """

    error: float
    bins: list[ScoreBin]


def measure_calibration(
    scores: np.ndarray | Sequence[float], is_right: np.ndarray | Sequence[bool], num_bins: int = 15
) -> Calibration:
    """
    The expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3): the
    distance between the accuracy and the mean score in each of several intervals of equal width, averaged with the
    numbers of expressions as weights.

    Args:
        scores (`np.ndarray` of shape `(N,)`): probabilities in [0, 1] that a box is right.
        is_right (`np.ndarray` of shape `(N,)`):
            Whether each box is right, which usually means that its IoU with the true box is at least 0.5. No box is
            right for an expression whose object is not in the picture.
        num_bins (`int`, *optional*, defaults to 15): number of intervals, by default as many as in Guo et al.

    Returns:
        [`Calibration`]: the error, and the intervals for a reliability diagram.

    Raises:
        `ValueError`: The model gives no scores, there are none, one is not in [0, 1], the arguments differ in length,
            `is_right` has other values than truth values, or `num_bins` is less than 1.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.score_quality import measure_calibration

    >>> calibration = measure_calibration([0.25, 0.75, 0.75], [False, True, False], num_bins=2)
    >>> calibration.bins[1]
    ScoreBin(lower=0.5, upper=1.0, count=2, mean_score=0.75, accuracy=0.5)
    >>> calibration.error
    0.25
    ```
    """
    scores, is_right = _check_scores(scores), _check_truth_values(is_right, "is_right", len(scores))
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}, expected at least 1.")
    upper_ends = np.arange(1, num_bins + 1) / num_bins
    bin_index = np.searchsorted(upper_ends, scores)
    bins = []
    for index in np.unique(bin_index).tolist():
        inside = bin_index == index
        mean_score, accuracy = float(scores[inside].mean()), float(is_right[inside].mean())
        bins.append(ScoreBin(index / num_bins, (index + 1) / num_bins, int(inside.sum()), mean_score, accuracy))
    error = sum(full.count * abs(full.accuracy - full.mean_score) for full in bins) / len(scores)
    return Calibration(error, bins)


def accuracy_over_coverage(scores: np.ndarray | Sequence[float], is_right: np.ndarray | Sequence[bool]) -> np.ndarray:
    """
    The accuracy that is left if only the best-scored boxes are kept, for every number of boxes that can be kept. It is
    1 minus the risk of the risk-coverage curve (Geifman & El-Yaniv 2017, "Selective Classification for Deep Neural
    Networks").

    Boxes with the same score have no order among them. Each counts as the share of them that is right, which gives the
    mean over all their orders, so that the curve does not depend on the order of the rows.

    Args:
        scores (`np.ndarray` of shape `(N,)`): probabilities in [0, 1] that a box is right.
        is_right (`np.ndarray` of shape `(N,)`): whether each box is right.

    Returns:
        `np.ndarray` of shape `(N,)`: the accuracy of the 1, 2, ..., N best-scored boxes. The last one is the accuracy
        of all. The mean is the area under the curve, which is 1 minus the AURC of Geifman et al. (2019).

    Raises:
        `ValueError`: See [`~score_quality.measure_calibration`].

    Example:

    ```python
    >>> from epmvg_hf.evaluation.score_quality import accuracy_over_coverage

    >>> curve = accuracy_over_coverage([0.2, 0.9, 0.4, 0.4], [False, True, True, False])
    >>> curve
    array([1.        , 0.75      , 0.66666667, 0.5       ])
    >>> round(float(curve.mean()), 3)
    0.729
    ```
    """
    scores, is_right = _check_scores(scores), _check_truth_values(is_right, "is_right", len(scores))
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)  # the best score is group 0
    share_right = np.bincount(group, weights=is_right) / sizes
    return np.repeat(share_right, sizes).cumsum() / np.arange(1, len(scores) + 1)


def presence_auroc(present_scores: np.ndarray | Sequence[float], absent_scores: np.ndarray | Sequence[float]) -> float:
    """
    The probability that an expression whose object is in the picture has a better score than one whose object is not,
    where equal scores count half: the Mann-Whitney U statistic as a fraction of all pairs, which is the area under the
    ROC curve (Hanley & McNeil 1982, "The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC)
    Curve").

    Args:
        present_scores (`np.ndarray` of shape `(N,)`): scores in [0, 1] of expressions whose object is in the picture.
        absent_scores (`np.ndarray` of shape `(M,)`): scores in [0, 1] of expressions whose object is not.

    Returns:
        `float`: 1 if every present object has a better score than every absent one, 0.5 for scores by chance.

    Raises:
        `ValueError`: The model gives no scores, there are none of one kind, or a score is not in [0, 1].

    Example:

    ```python
    >>> from epmvg_hf.evaluation.score_quality import presence_auroc

    >>> presence_auroc(present_scores=[0.9, 0.4], absent_scores=[0.1, 0.4])
    0.875
    ```
    """
    present = _check_scores(present_scores, "present_scores")
    absent = np.sort(_check_scores(absent_scores, "absent_scores"))
    lower, lower_or_equal = np.searchsorted(absent, present, "left"), np.searchsorted(absent, present, "right")
    return float((lower + lower_or_equal).mean() / (2 * len(absent)))


def evaluate_scores(
    scores: np.ndarray | Sequence[float],
    predictions: np.ndarray | Sequence[Sequence[float]],
    references: np.ndarray | Sequence[Sequence[float] | None],
    is_absent: np.ndarray | Sequence[bool] | None = None,
) -> dict[str, float]:
    """
    What the scores of N predicted boxes are worth. A box is right if its IoU with the true box is at least 0.5.
    Expressions that have no true box and are not known to be absent do not count, because nobody knows what their
    score should be.

    Args:
        scores (`np.ndarray` of shape `(N,)`): probabilities in [0, 1] that a predicted box is right.
        predictions (`np.ndarray` of shape `(N, 4)`): predicted boxes (x1, y1, x2, y2).
        references (`np.ndarray` of shape `(N, 4)` or `Sequence`):
            True boxes in the same unit; four times NaN, or `None`, where there is none.
        is_absent (`np.ndarray` of shape `(N,)`, *optional*):
            Whether the object of each expression is known not to be in the picture.

    Returns:
        `dict[str, float]`: of the expressions with a true box the `calibration_error`, the accuracy of the best-scored
        quarter, half and three quarters (`acc@0.5_at_coverage_0.25` and so on, with a fraction of a box rounded up)
        and of all (`acc@0.5`), and the mean accuracy over all coverages (`area_over_coverage`). With `is_absent` also
        `presence_auroc`, which compares their scores with those of the absent expressions.

    Raises:
        `ValueError`: The model gives no scores, one is not in [0, 1], the arguments differ in length, no expression
            has a true box, or `is_absent` is true of none, or of one with a true box.

    Example:

    ```python
    >>> from epmvg_hf.evaluation.score_quality import evaluate_scores

    >>> predictions, references = [[0, 0, 9, 9]] * 3, [[0, 0, 9, 9], [5, 5, 20, 20], None]
    >>> result = evaluate_scores([0.75, 0.5, 0.25], predictions, references, is_absent=[False, False, True])
    >>> result["acc@0.5_at_coverage_0.5"], result["acc@0.5"], result["calibration_error"], result["presence_auroc"]
    (1.0, 0.5, 0.375, 1.0)
    ```
    """
    scores = _check_scores(scores)
    if not len(scores) == len(predictions) == len(references):
        lengths = f"{len(scores)} scores, {len(predictions)} predictions and {len(references)} references"
        raise ValueError(f"there are {lengths}, expected equally many.")
    true_boxes, has_box = find_boxes(references, "references")
    is_right = paired_iou(np.asarray(predictions, np.float64)[has_box], true_boxes[has_box]) >= 0.5
    curve = accuracy_over_coverage(scores[has_box], is_right)
    result = {"calibration_error": measure_calibration(scores[has_box], is_right).error}
    for coverage in (0.25, 0.5, 0.75):
        result[f"acc@0.5_at_coverage_{coverage}"] = float(curve[int(np.ceil(coverage * len(curve))) - 1])
    result |= {"acc@0.5": float(curve[-1]), "area_over_coverage": float(curve.mean())}
    if is_absent is not None:
        is_absent = _check_truth_values(is_absent, "is_absent", len(scores))
        if (is_absent & has_box).any():
            row = np.flatnonzero(is_absent & has_box)[0]
            raise ValueError(f"is_absent[{row}] is true although references[{row}] is a box.")
        result["presence_auroc"] = presence_auroc(scores[has_box], scores[is_absent])
    return result


def draw_scores(
    path: str | os.PathLike, scores: np.ndarray | Sequence[float], is_right: np.ndarray | Sequence[bool]
) -> None:
    """
    Writes a picture with two panels: a reliability diagram, and the accuracy over the coverage.

    Args:
        path (`str` or `os.PathLike`): the picture file to write, in the format that its suffix names.
        scores (`np.ndarray` of shape `(N,)`): probabilities in [0, 1] that a box is right.
        is_right (`np.ndarray` of shape `(N,)`): whether each box is right.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: See [`~score_quality.measure_calibration`].

    Example:

    ```python
    >>> from PIL import Image
    >>> from epmvg_hf.evaluation.score_quality import draw_scores

    >>> draw_scores("scores.png", scores=[0.9, 0.8, 0.3], is_right=[True, True, False])
    >>> Image.open("scores.png").size
    (1100, 500)
    ```
    """
    with needs_extra("draw_scores", "train"):
        from matplotlib.figure import Figure

    calibration, curve = measure_calibration(scores, is_right), accuracy_over_coverage(scores, is_right)
    # pyplot would keep the figure in a list that all threads share.
    figure = Figure(figsize=(11, 5), layout="constrained")
    reliability, coverage = figure.subplots(1, 2)

    bins = calibration.bins
    centres, mean_scores = [(full.lower + full.upper) / 2 for full in bins], [full.mean_score for full in bins]
    accuracies, widths = [full.accuracy for full in bins], [full.upper - full.lower for full in bins]
    reliability.bar(centres, accuracies, widths, color="lightsteelblue", edgecolor="white", label="accuracy")
    reliability.plot(mean_scores, accuracies, "ko", markersize=4, label="accuracy at mean score", clip_on=False)
    reliability.plot([0, 1], [0, 1], color="gray", linestyle="--", label="calibrated")
    counts = reliability.secondary_xaxis("top")
    counts.set_xticks(centres, [str(full.count) for full in bins], rotation=90, fontsize=8)
    counts.set_xlabel("expressions of each bar")
    reliability.set(title=f"expected calibration error {calibration.error:.3f}", xlabel="score")

    shares = np.arange(1, len(curve) + 1) / len(curve)
    coverage.plot(shares, curve, label="best-scored boxes", clip_on=False)
    coverage.axhline(curve[-1], color="gray", linestyle="--", label=f"all boxes: {curve[-1]:.3f}")
    coverage.set(title=f"area under the curve {curve.mean():.3f}", xlabel="coverage (share of the boxes that is kept)")
    coverage.grid(alpha=0.3)

    for axis in (reliability, coverage):
        axis.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy (share of boxes that are right)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def _check_scores(scores: np.ndarray | Sequence[float], name: str = "scores") -> np.ndarray:
    """The scores as `(N,)` of float64. A `ValueError` if there are none, or if one is not in [0, 1]."""
    if scores is None or any(score is None for score in scores):
        raise ValueError(f"{name} are None: the model has no score head, so it gives no scores.")
    numbers = np.asarray(scores, np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{name} have the shape {numbers.shape}, expected (N,).")
    if len(numbers) == 0:
        raise ValueError(f"there are no {name}, expected at least one.")
    outside = np.flatnonzero(~((numbers >= 0) & (numbers <= 1)))
    if len(outside):
        raise ValueError(f"{name}[{outside[0]}] is {numbers[outside[0]]}, expected a probability in [0, 1].")
    return numbers


def _check_truth_values(values: np.ndarray | Sequence[bool], name: str, length: int) -> np.ndarray:
    """The values as `(N,)` of bool. A `ValueError` if their number is another one, or if they are not truth values."""
    values = np.asarray(values)
    if values.shape != (length,):
        raise ValueError(f"{name} has the shape {values.shape}, but there are {length} scores, expected ({length},).")
    if values.dtype != bool:
        raise ValueError(f"{name} has values of the type {values.dtype}, expected truth values.")
    return values
