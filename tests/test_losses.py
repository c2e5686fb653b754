import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from epmvg_hf.losses import (
    box_loss,
    box_map_target,
    feature_loss,
    has_box,
    map_loss,
    relation_loss,
    teacher_map_target,
)

# The references are loops over single numbers: Python floats for a loss, float64 scalars of torch for its gradients.


def _exp(x):
    return x.exp() if torch.is_tensor(x) else math.exp(x)


def _log(x):
    return x.log() if torch.is_tensor(x) else math.log(x)


def _dot(left, right):
    return sum(x * y for x, y in zip(left, right, strict=True))


def _softmax(scores: list) -> list:
    total = sum(_exp(score) for score in scores)
    return [_exp(score) / total for score in scores]


def _kl(target: list[float], scores) -> float:
    """KL divergence from a distribution to the softmax of scores."""
    log_total = _log(sum(_exp(score) for score in scores))
    return sum(p * (math.log(p) - (score - log_total)) for p, score in zip(target, scores, strict=True) if p > 0)


def _check(loss: Callable, reference: Callable, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Compares a float32 loss of `inputs` and its gradients with the reference's; returns the gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(*(x.double().tolist() for x in inputs)), abs=1e-6, rel=1e-6)
    gradients = torch.autograd.grad(value, leaves)
    doubles = [x.double().requires_grad_() for x in inputs]
    for gradient, expected in zip(gradients, torch.autograd.grad(reference(*doubles), doubles), strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=1e-5, rtol=0)
        assert expected.abs().max() > 1e-3  # or the comparison would say nothing
    return list(gradients)


def _random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
    return torch.cat([centres, torch.rand(count, 2, generator=generator) * 0.3 + 0.05], dim=-1)


def _random_embeds(*shape: int, seed: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


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
        gradients += _check(
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
            total = total + _kl([target[row, v].item() for v in kept], [scores[row][v] for v in kept])
    return total / len(rows)


def test_map_loss_equals_a_float64_loop_and_ignores_padding():
    scores, target, mask = _map_case()
    (gradient,) = _check(
        lambda s: map_loss(s, target, mask), lambda s: _map_loss_by_loop(s, target, mask, range(5)), scores
    )
    assert (gradient[~mask] == 0).all()
    changed = scores.masked_fill(~mask, 50.0)
    assert map_loss(changed, target, mask) == map_loss(scores, target, mask)


def test_map_loss_of_a_row_without_target_or_positions_is_zero():
    scores, target, mask = _map_case()
    target[1] = 0
    mask[3] = False  # its target is left as it is
    (gradient,) = _check(
        lambda s: map_loss(s, target, mask), lambda s: _map_loss_by_loop(s, target, mask, range(5)), scores
    )
    assert (gradient[[1, 3]] == 0).all()


def test_map_loss_averages_over_the_rows_of_row_mask():
    scores, target, mask = _map_case()
    row_mask = torch.tensor([True, False, True, False, True])
    target[1] = math.nan  # the other rows may hold anything
    (gradient,) = _check(
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


def _resize_weights(old: int, new: int) -> list[list[float]]:
    """Weight of each of `old` cells in each of `new` cells of one line: a triangle around the new cell's centre."""
    reach = max(old / new, 1)
    weights = []
    for cell in range(new):
        centre = (cell + 0.5) * old / new
        row = [max(0.0, 1 - abs(other + 0.5 - centre) / reach) for other in range(old)]
        weights.append([weight / sum(row) for weight in row])
    return weights


@pytest.mark.parametrize("patch_grid", [(4, 6), (3, 3), (9, 14), (8, 4)], ids=["same", "up", "down", "down and up"])
def test_teacher_map_target_equals_a_float64_loop(patch_grid):
    grid, temperature = (4, 6), 0.2
    image_index = [0, 2, 2, 2, 0]  # image 1 has no expression
    patches, texts = _random_embeds(3, *patch_grid, 5, seed=0), _random_embeds(5, 5, seed=1)
    mask = torch.ones(5, *grid, dtype=torch.bool)
    mask[0, :, 4:] = False
    mask[2, :1] = False
    mask[4] = False
    target = teacher_map_target(patches, texts, torch.tensor(image_index), mask, temperature)
    assert target.shape == (5, 24) and target.dtype == torch.float32
    assert (target[~mask.flatten(1)] == 0).all()

    down, across = (_resize_weights(old, new) for old, new in zip(patch_grid, grid, strict=True))
    for n, (text, image) in enumerate(zip(texts.double().tolist(), image_index, strict=True)):
        cosines = [[_dot(patch, text) for patch in row] for row in patches[image].double().tolist()]
        kept = [(y, x) for y in range(grid[0]) for x in range(grid[1]) if mask[n, y, x]]
        resized = [
            sum(v * h * cosines[i][j] for i, v in enumerate(down[y]) for j, h in enumerate(across[x])) for y, x in kept
        ]
        expected = [0.0] * 24
        for (y, x), p in zip(kept, _softmax([score / temperature for score in resized]), strict=True):
            expected[y * 6 + x] = p
        assert target[n].tolist() == pytest.approx(expected, abs=1e-6)


def test_teacher_map_target_in_order_in_bfloat16_and_under_autocast():
    patches, texts = _random_embeds(3, 4, 4, 8, seed=0), _random_embeds(3, 8, seed=1)
    mask = torch.ones(3, 6, 6, dtype=torch.bool)
    target = teacher_map_target(patches, texts, torch.arange(3), mask, 0.01)
    assert torch.equal(teacher_map_target(patches, texts, None, mask, 0.01), target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher_map_target(patches, texts, None, mask, 0.01), target)
    rounded = teacher_map_target(patches.bfloat16(), texts.bfloat16(), None, mask, 0.01)
    assert torch.equal(
        rounded, teacher_map_target(patches.bfloat16().float(), texts.bfloat16().float(), None, mask, 0.01)
    )


def test_teacher_map_target_is_a_target_of_map_loss_without_gradient():
    patches, texts = _random_embeds(2, 3, 3, 5, seed=0).requires_grad_(), _random_embeds(2, 5, seed=1)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 2:] = False
    target = teacher_map_target(patches, texts, None, mask, 0.1)
    assert not target.requires_grad
    assert map_loss(target.clamp(min=1e-30).log(), target, mask.flatten(1)).abs() < 1e-6


def _relation_by_loop(images, texts, teacher_images, teacher_texts, temperature, teacher_temperature):
    """`images` and `texts` of either kind of number, the teacher's as floats."""
    student = [[_dot(image, text) / temperature for text in texts] for image in images]
    teacher = [[_dot(image, text) / teacher_temperature for text in teacher_texts] for image in teacher_images]
    over_texts = sum(_kl(_softmax(t), s) for t, s in zip(teacher, student, strict=True)) / len(student)
    columns = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
    over_images = sum(_kl(_softmax(t), s) for t, s in columns) / len(student[0])
    return (over_texts + over_images) / 2


# Expressions are about images 0, 0, 0, 1, 3, 3, 3: near their own in the teacher's space, image 2 without any.
def _relation_case() -> list[torch.Tensor]:
    teacher_images = _random_embeds(4, 9, seed=2)
    noise = _random_embeds(7, 9, seed=3)
    teacher_texts = nn.functional.normalize(teacher_images[[0, 0, 0, 1, 3, 3, 3]] + 0.5 * noise, dim=-1)
    return [_random_embeds(4, 6, seed=0), _random_embeds(7, 6, seed=1), teacher_images, teacher_texts]


@pytest.mark.parametrize("temperatures", [(0.1, 0.1), (0.2, 0.05), (0.05, 0.2)])
def test_relation_loss_equals_a_float64_loop(temperatures):
    images, texts, *teacher = _relation_case()
    numbers = [embeds.double().tolist() for embeds in teacher]
    _check(
        lambda i, t: relation_loss(i, t, *teacher, *temperatures),
        lambda i, t: _relation_by_loop(i, t, *numbers, *temperatures),
        images,
        texts,
    )


def test_relation_loss_can_learn_the_temperature_but_not_the_teacher():
    images, texts, *teacher = _relation_case()
    numbers = [embeds.double().tolist() for embeds in (images, texts, *teacher)]
    _check(
        lambda temperature: relation_loss(images, texts, *teacher, temperature, 0.1),
        lambda temperature: _relation_by_loop(*numbers, temperature, 0.1),
        torch.tensor(0.2),
    )
    teacher = [embeds.requires_grad_() for embeds in teacher]
    teacher_temperature = torch.tensor(0.1, requires_grad=True)
    loss = relation_loss(images.requires_grad_(), texts, *teacher, 0.2, teacher_temperature)
    loss.backward()
    assert images.grad is not None
    assert all(leaf.grad is None for leaf in (*teacher, teacher_temperature))


def test_relation_loss_is_zero_only_where_the_student_is_the_teacher():
    images, texts, *teacher = _relation_case()
    assert relation_loss(*teacher, *teacher, 0.1, 0.1) == 0
    # Another space that holds the same cosines is as good.
    turn = torch.linalg.qr(torch.randn(12, 9, generator=torch.Generator().manual_seed(4)))[0].T
    assert relation_loss(*(embeds @ turn for embeds in teacher), *teacher, 0.1, 0.1).abs() < 1e-6
    assert relation_loss(*teacher, *teacher, 0.1, 0.2) > 0.01
    assert relation_loss(images, texts, *teacher, 0.1, 0.1) > 0.01


def test_relation_loss_in_bfloat16_and_under_autocast():
    embeds = _relation_case()
    expected = relation_loss(*embeds, 0.01, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relation_loss(*embeds, 0.01, 0.02), expected)
    rounded = relation_loss(*(x.bfloat16() for x in embeds), 0.01, 0.02)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, relation_loss(*(x.bfloat16().float() for x in embeds), 0.01, 0.02))


def _cosine_distance(left, right):
    return 1 - _dot(left, right) / (_dot(left, left) * _dot(right, right)) ** 0.5


def test_feature_loss_equals_a_float64_loop_at_any_length():
    student = [2 * _random_embeds(4, 6, seed=0), 0.5 * _random_embeds(7, 6, seed=1)]
    teacher = [_random_embeds(4, 6, seed=2), 3 * _random_embeds(7, 6, seed=3)]
    numbers = [embeds.double().tolist() for embeds in teacher]
    _check(
        lambda i, t: feature_loss(i, t, *teacher),
        lambda i, t: sum(
            sum(_cosine_distance(s, u) for s, u in zip(mine, theirs, strict=True)) / len(theirs)
            for mine, theirs in zip((i, t), numbers, strict=True)
        ),
        *student,
    )
    assert feature_loss(*(5 * embeds for embeds in teacher), *teacher).abs() < 1e-6
    opposite = feature_loss(*(-embeds for embeds in teacher), *teacher)
    assert opposite.item() == pytest.approx(4)
    teacher = [embeds.requires_grad_() for embeds in teacher]
    feature_loss(student[0].requires_grad_(), student[1], *teacher).backward()
    assert student[0].grad is not None and all(embeds.grad is None for embeds in teacher)
    assert feature_loss(*(embeds.detach().bfloat16() for embeds in (*student, *teacher))).dtype == torch.float32


@pytest.mark.parametrize("widths", [(6, 6, 9, 9), (6, 6, 6, 9), (6, 1, 6, 9)])
def test_feature_loss_wants_equal_widths(widths):
    with pytest.raises(ValueError, match=rf"the student's have {widths[1]} dimensions and the teacher's 9$"):
        feature_loss(*(torch.ones(2, width) for width in widths))
