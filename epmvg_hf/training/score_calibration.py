"""Makes the scores of a trained model probabilities, from how often its boxes are right on other data."""

import numpy as np
import torch
from torch import nn

from ..model.modeling_epmvg import EpmVGForVisualGrounding


def calibrate_scores(model: EpmVGForVisualGrounding, scores: np.ndarray, is_right: np.ndarray) -> tuple[float, float]:
    """
    Scales and shifts the logits of a model's scores so that they fit how often its boxes are right (Platt 1999). The
    two numbers go into the last layer of the score head. The order of the scores stays.

    A score learns the IoU of the model's boxes on images that it is trained on, where they are better than on others.
    Afterwards it is the probability that a box is right, which data that was not trained on tells.

    Args:
        model ([`EpmVGForVisualGrounding`]): has a score head, which is changed in place.
        scores (`np.ndarray` of shape `(N,)`): scores that this model gave.
        is_right (`np.ndarray` of shape `(N,)`): whether the boxes have an IoU of at least 0.5 with the true ones.

    Returns:
        `tuple[float, float]`: the scale and the shift.

    Raises:
        ValueError: all boxes are right or all are wrong, or the scores order them no better than chance.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf import EpmVGForVisualGrounding
    >>> from epmvg_hf.training.score_calibration import calibrate_scores

    >>> scoring = EpmVGForVisualGrounding.from_pretrained("outputs/demo", score_head=True)
    >>> scores, is_right = np.array([0.2, 0.2, 0.8, 0.8]), np.array([False, True, True, True])
    >>> scale, shift = calibrate_scores(scoring, np.repeat(scores, 9), np.repeat(is_right, 9))
    >>> scale > 0
    True
    ```
    """
    scale, shift = _fit(scores, is_right)
    if scale <= 0:
        raise ValueError(
            "the scores order right and wrong boxes no better than chance, so calibration would turn them"
        )
    last = model.score_head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(scale)
        last.bias.mul_(scale).add_(shift)
    return scale, shift


def calibrate_across(scores: np.ndarray, is_right: np.ndarray, is_first: np.ndarray) -> np.ndarray:
    """
    Calibrates each half of the scores by what the other half says. Their calibration error is then an honest one.

    Args:
        scores (`np.ndarray` of shape `(N,)`): scores in [0, 1].
        is_right (`np.ndarray` of shape `(N,)`): whether the boxes are right.
        is_first (`np.ndarray` of shape `(N,)`): which rows are in the first half. Rows of an image belong together.

    Returns:
        `np.ndarray` of shape `(N,)`: the calibrated scores.

    Raises:
        ValueError: all boxes of a half are right, or none is.

    Example:

    ```python
    >>> import numpy as np
    >>> from epmvg_hf.training.score_calibration import calibrate_across

    >>> is_right, is_first = np.array([True, False] * 8), np.arange(16) < 8
    >>> calibrate_across(np.full(16, 0.9), is_right, is_first).round(2)[:2]  # half of the boxes are right
    array([0.5, 0.5])
    ```
    """
    calibrated = np.empty(len(scores))
    for half in (is_first, ~is_first):
        scale, shift = _fit(scores[half], is_right[half])
        calibrated[~half] = (scale * _logits(scores[~half]) + shift).sigmoid().numpy()
    return calibrated


def _fit(scores: np.ndarray, is_right: np.ndarray) -> tuple[float, float]:
    if is_right.all() or not is_right.any():
        share = "all" if is_right.all() else "none"
        raise ValueError(f"{share} of the {len(is_right)} boxes are right, so scores cannot be calibrated on them")
    return fit_scale_and_shift(_logits(scores), torch.from_numpy(is_right))


def _logits(scores: np.ndarray) -> torch.Tensor:
    return torch.special.logit(torch.from_numpy(scores).double(), eps=1e-6)


def fit_scale_and_shift(logits: torch.Tensor, is_right: torch.Tensor) -> tuple[float, float]:
    """
    The logistic regression of truth values on logits, float64, by Newton's method, which finds its only optimum.

    Args:
        logits (`torch.DoubleTensor` of shape `(N,)`): scores before the sigmoid.
        is_right (`torch.BoolTensor` of shape `(N,)`): at least one of each kind.

    Returns:
        `tuple[float, float]`: scale and shift.
    """
    inputs = torch.stack([logits, torch.ones_like(logits)], dim=1)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # A trace of a prior keeps the weights finite where a threshold separates right from wrong boxes.
    prior = 1e-3
    for _ in range(50):
        predicted = (inputs @ weights).sigmoid()
        gradient = inputs.T @ (predicted - is_right.double()) + prior * weights
        curvature = inputs.T @ (inputs * (predicted * (1 - predicted))[:, None]) + prior * torch.eye(2).double()
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step / max(1.0, float(step.abs().max()))
        if step.abs().max() < 1e-9:
            break
    scale, shift = weights.tolist()
    return scale, shift
