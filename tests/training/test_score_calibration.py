import numpy as np
import pytest
import torch

from epmvg_hf.training.score_calibration import calibrate_across, calibrate_scores, fit_scale_and_shift
from tests.fixtures.models import tiny_model


def test_the_fit_is_the_most_likely_one():
    """No other scale and shift near by, or anywhere on a grid, makes the truth values more likely."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, generator=generator).double()
    is_right = torch.rand(4000, generator=generator) < (0.6 * logits - 0.8).sigmoid()
    scale, shift = fit_scale_and_shift(logits, is_right)
    assert scale == pytest.approx(0.6, abs=0.1) and shift == pytest.approx(-0.8, abs=0.1)

    def loss(scale: float, shift: float) -> float:
        fitted = scale * logits + shift
        return torch.nn.functional.binary_cross_entropy_with_logits(fitted, is_right.double()).item()

    steps = [(a, b) for a in np.linspace(-1, 3, 21) for b in np.linspace(-3, 3, 21)]
    steps += [(scale + a, shift + b) for a in (-1e-3, 0, 1e-3) for b in (-1e-3, 0, 1e-3)]
    assert all(loss(scale, shift) <= loss(*step) + 1e-9 for step in steps)


def test_scores_that_part_right_from_wrong_stay_finite():
    logits = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    scale, shift = fit_scale_and_shift(logits, logits > 0)
    assert 0 < scale < 1e4 and abs(shift) < 1e4


def test_each_half_is_calibrated_by_the_other():
    """The first half's boxes are right as often as the scores say, the second half's half as often."""
    generator = np.random.default_rng(0)
    scores, is_first = generator.uniform(0.05, 0.95, 4000), np.arange(4000) % 2 == 0
    is_right = generator.random(4000) < np.where(is_first, scores, scores / 2)
    calibrated = calibrate_across(scores, is_right, is_first)
    assert calibrated[~is_first] == pytest.approx(scores[~is_first], abs=0.05)
    assert calibrated[is_first].mean() == pytest.approx(is_right[~is_first].mean(), abs=0.02)


def test_the_score_head_gives_the_fitted_scores():
    model = tiny_model(score_head=True)
    inputs = {"pixel_values": torch.randn(6, 3, 64, 64), "input_ids": torch.randint(5, 19, (6, 4))}
    with torch.no_grad():
        before = model(**inputs)
        scores = before.scores.numpy()
        is_right = np.array([False, True, False, True, True, True])[np.argsort(np.argsort(scores))]
        scale, shift = calibrate_scores(model, scores, is_right)
        after = model(**inputs)
    expected = (scale * torch.special.logit(before.scores.double()) + shift).sigmoid()
    torch.testing.assert_close(after.scores.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(after.pred_boxes, before.pred_boxes)


@pytest.mark.parametrize(
    ("is_right", "message"),
    [
        ([True] * 4, "all of the 4 boxes are right"),
        ([False] * 4, "none of the 4 boxes are right"),
        ([True, True, False, False], "no better than chance"),
    ],
)
def test_scores_that_cannot_be_calibrated(is_right, message):
    model = tiny_model(score_head=True)
    weight = model.score_head[-1].weight.clone()
    with pytest.raises(ValueError, match=message):
        calibrate_scores(model, np.array([0.1, 0.2, 0.8, 0.9]), np.array(is_right))
    assert torch.equal(model.score_head[-1].weight, weight)
