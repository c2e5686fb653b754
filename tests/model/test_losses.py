import math

import numpy as np
import torch
from torchvision.ops import box_convert, generalized_box_iou_loss

from epmvg_hf.model.losses import box_loss, box_map_target, has_box, map_loss, score_loss

# The references are loops over single numbers, which are Python floats for losses and float64 scalars for gradients.
from tests.fixtures.loops import check_against_loop, exp, kl, log


def _random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
    return torch.cat([centres, torch.rand(count, 2, generator=generator) * 0.3 + 0.05], dim=-1)


def _l1(p, t):
    return sum(abs(x - y) for x, y in zip(p, t, strict=True))


def _giou(p, t):
    px1, py1, px2, py2 = p[0] - p[2] / 2, p[1] - p[3] / 2, p[0] + p[2] / 2, p[1] + p[3] / 2
    tx1, ty1, tx2, ty2 = t[0] - t[2] / 2, t[1] - t[3] / 2, t[0] + t[2] / 2, t[1] + t[3] / 2
    intersection = max(0, min(px2, tx2) - max(px1, tx1)) * max(0, min(py2, ty2) - max(py1, ty1))
    union = p[2] * p[3] + t[2] * t[3] - intersection
    hull = (max(px2, tx2) - min(px1, tx1)) * (max(py2, ty2) - min(py1, ty1))
    # torchvision adds 1e-7 to both denominators, which a small box's gradient shows.
    return 1 - (intersection / (union + 1e-7) - (hull - union) / (hull + 1e-7))


def _check_box_loss(predicted: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Compares both losses and their gradients with the mean over the rows that have a box."""
    boxes = labels.double().tolist()
    rows = [row for row, box in enumerate(boxes) if not all(math.isnan(x) for x in box)]
    gradients = []
    for name, single in (("loss_bbox", _l1), ("loss_giou", _giou)):
        gradients += check_against_loop(
            lambda p, name=name: box_loss(p, labels)[name],
            lambda p, single=single: sum(single(p[row], boxes[row]) for row in rows) / len(rows),
            predicted,
        )
    return gradients


def test_box_loss_equals_a_float64_loop():
    _check_box_loss(_random_boxes(20, 0), _random_boxes(20, 1))


def test_box_loss_of_boxes_is_torchvisions_to_the_last_bit():
    predicted, labels = _random_boxes(50, 0).requires_grad_(), _random_boxes(50, 1)
    losses = box_loss(predicted, labels)
    expected = {
        "loss_bbox": (predicted - labels).abs().sum(-1).mean(),
        "loss_giou": generalized_box_iou_loss(
            box_convert(predicted, "cxcywh", "xyxy"), box_convert(labels, "cxcywh", "xyxy"), reduction="mean"
        ),
    }
    for name, loss in losses.items():
        assert torch.equal(loss, expected[name])
        gradients = (torch.autograd.grad(x, predicted, retain_graph=True)[0] for x in (loss, expected[name]))
        assert torch.equal(*gradients)


def test_box_loss_leaves_out_rows_without_a_box():
    predicted, labels = _random_boxes(7, 0), _random_boxes(7, 1)
    without = torch.tensor([0, 3, 4])
    labels[without] = math.nan
    assert has_box(labels).tolist() == [False, True, True, False, False, True, True]
    for gradient in _check_box_loss(predicted, labels):
        assert (gradient[without] == 0).all()


def test_box_loss_is_zero_where_no_row_has_a_box():
    predicted = _random_boxes(3, 0).requires_grad_()
    for loss in box_loss(predicted, torch.full((3, 4), math.nan)).values():
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, predicted, retain_graph=True)
        assert (gradient == 0).all()


def test_a_label_that_is_nan_in_part_shows_in_the_loss():
    labels = _random_boxes(3, 1)
    labels[1, 2] = math.nan
    assert has_box(labels).all()
    assert all(loss.isnan() for loss in box_loss(_random_boxes(3, 0), labels).values())
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    assert map_loss(torch.zeros(3, 16), box_map_target(labels, mask), mask.flatten(1)).isnan()


def test_map_target_is_the_area_shared_with_the_box():
    labels = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.06, 0.06, 0.02, 0.02]])
    mask = torch.ones(2, 4, 8, dtype=torch.bool)
    mask[:, :, -1] = False
    target = box_map_target(labels, mask).view(2, 4, 8)
    # Count fine samples of the first box per cell, padding left out.
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for y in np.linspace(0.375, 0.625, 400, endpoint=False) + 0.125 / 400:
        for x in np.linspace(0.25, 0.75, 400, endpoint=False) + 0.25 / 400:
            expected[int(y * 4), int(x * 8)] += 1
    torch.testing.assert_close(target[0].double(), expected / expected.sum(), atol=1e-5, rtol=0)
    assert target[1, 0, 0] == 1  # a box smaller than a cell still has a target
    torch.testing.assert_close(target.sum((1, 2)), torch.ones(2))


def test_map_target_of_no_box_is_zero():
    labels = _random_boxes(4, 2)
    mask = torch.ones(4, 4, 4, dtype=torch.bool)
    expected = box_map_target(labels, mask)
    labels[[0, 2]] = math.nan
    target = box_map_target(labels, mask)
    assert (target[[0, 2]] == 0).all()
    assert torch.equal(target[[1, 3]], expected[[1, 3]])


def _map_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `(5, 16)`, target and mask; the last row of the grid is padding."""
    scores = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[:, 3] = False
    return scores, box_map_target(_random_boxes(5, 2), mask), mask.flatten(1)


def _map_loss_by_loop(scores, target: torch.Tensor, mask: torch.Tensor, rows: list[int]):
    """Mean over `rows` of the divergences over their unmasked positions."""
    total = 0.0
    for row in rows:
        kept = [position for position, keep in enumerate(mask[row].tolist()) if keep]
        if kept:
            total = total + kl([target[row, v].item() for v in kept], [scores[row][v] for v in kept])
    return total / len(rows)


def test_map_loss_equals_a_float64_loop_and_ignores_padding():
    scores, target, mask = _map_case()
    (gradient,) = check_against_loop(
        lambda s: map_loss(s, target, mask), lambda s: _map_loss_by_loop(s, target, mask, range(5)), scores
    )
    assert (gradient[~mask] == 0).all()
    changed = scores.masked_fill(~mask, 50.0)
    assert map_loss(changed, target, mask) == map_loss(scores, target, mask)


def test_map_loss_of_a_row_without_target_or_positions_is_zero():
    scores, target, mask = _map_case()
    target[1] = 0
    mask[3] = False  # its target is left as it is
    (gradient,) = check_against_loop(
        lambda s: map_loss(s, target, mask), lambda s: _map_loss_by_loop(s, target, mask, range(5)), scores
    )
    assert (gradient[[1, 3]] == 0).all()


def test_map_loss_averages_over_the_rows_of_row_mask():
    scores, target, mask = _map_case()
    row_mask = torch.tensor([True, False, True, False, True])
    target[1] = math.nan  # the other rows may hold anything
    (gradient,) = check_against_loop(
        lambda s: map_loss(s, target, mask, row_mask),
        lambda s: _map_loss_by_loop(s, target, mask, [0, 2, 4]),
        scores,
    )
    assert (gradient[~row_mask] == 0).all()
    scores[3] = math.nan
    assert map_loss(scores, target, mask, row_mask).isfinite()
    none = map_loss(scores.requires_grad_(), target, mask, torch.zeros(5, dtype=torch.bool))
    assert none == 0
    assert (torch.autograd.grad(none, scores)[0] == 0).all()


def test_map_loss_is_zero_at_its_target():
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    target = box_map_target(_random_boxes(3, 3), mask)
    assert map_loss(target.clamp(min=1e-30).log(), target, mask.flatten(1)).abs() < 1e-6


def test_score_loss_equals_a_float64_loop():
    """Rows of NaN take no part, the target of a row of zeros is 0, that of the others their IoU."""
    predicted, labels = _random_boxes(12, 0), _random_boxes(12, 1)
    labels[[2, 5]], labels[[3, 7, 8]] = torch.nan, 0

    def iou(one: list[float], other: list[float]) -> float:
        sides = []
        for axis in (0, 1):
            low = max(one[axis] - one[axis + 2] / 2, other[axis] - other[axis + 2] / 2)
            high = min(one[axis] + one[axis + 2] / 2, other[axis] + other[axis + 2] / 2)
            sides.append(max(high - low, 0))
        shared = sides[0] * sides[1]
        return shared / (one[2] * one[3] + other[2] * other[3] - shared + 1e-7)

    boxes, targets = predicted.double().tolist(), labels.double().tolist()
    rows = [row for row in range(12) if row not in (2, 5)]
    quality = [0 if row in (3, 7, 8) else iou(boxes[row], targets[row]) for row in range(12)]

    def loop(logits):
        losses = []
        for row in rows:
            score = 1 / (1 + exp(-logits[row][0]))
            losses.append(-quality[row] * log(score) - (1 - quality[row]) * log(1 - score))
        return sum(losses) / len(losses)

    logits = torch.randn(12, 1, generator=torch.Generator().manual_seed(0))
    check_against_loop(lambda x: score_loss(x[:, 0], predicted, labels), loop, logits)


def test_score_loss_gives_boxes_no_gradient_and_is_zero_without_rows():
    predicted, logits = _random_boxes(3, 0).requires_grad_(), torch.zeros(3, requires_grad=True)
    score_loss(logits, predicted, _random_boxes(3, 1)).backward()
    assert predicted.grad is None
    nothing = score_loss(logits, predicted, torch.full((3, 4), torch.nan))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].tolist() == [0, 0, 0]
