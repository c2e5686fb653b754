import numpy as np
import torch

from epmvg_hf.losses import box_loss, box_map_target, map_loss


def _random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
    return torch.cat([centres, torch.rand(count, 2, generator=generator) * 0.3 + 0.05], dim=-1)


def test_box_loss_equals_a_float64_loop():
    predicted, true = _random_boxes(20, 0), _random_boxes(20, 1)
    l1, giou = [], []
    for p, t in zip(predicted.double().numpy(), true.double().numpy(), strict=True):
        l1.append(np.abs(p - t).sum())
        (px1, py1), (px2, py2) = p[:2] - p[2:] / 2, p[:2] + p[2:] / 2
        (tx1, ty1), (tx2, ty2) = t[:2] - t[2:] / 2, t[:2] + t[2:] / 2
        intersection = max(0, min(px2, tx2) - max(px1, tx1)) * max(0, min(py2, ty2) - max(py1, ty1))
        union = p[2] * p[3] + t[2] * t[3] - intersection
        hull = (max(px2, tx2) - min(px1, tx1)) * (max(py2, ty2) - min(py1, ty1))
        giou.append(1 - (intersection / union - (hull - union) / hull))
    losses = box_loss(predicted, true)
    assert abs(losses["loss_bbox"].item() - np.mean(l1)) < 1e-6
    assert abs(losses["loss_giou"].item() - np.mean(giou)) < 1e-5


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


def test_map_loss_equals_a_float64_loop_and_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 16, generator=generator)
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[:, 3] = False
    target = box_map_target(_random_boxes(5, 2), mask)
    expected = 0.0
    for row in range(5):
        s, t = scores[row, :12].double().numpy(), target[row, :12].double().numpy()
        log_p = s - np.log(np.exp(s).sum())
        expected += sum(a * (np.log(a) - b) for a, b in zip(t, log_p, strict=True) if a > 0) / 5
    flat_mask = mask.flatten(1)
    assert abs(map_loss(scores, target, flat_mask).item() - expected) < 1e-6
    changed = scores.masked_fill(~flat_mask, 50.0)
    assert map_loss(changed, target, flat_mask) == map_loss(scores, target, flat_mask)


def test_map_loss_is_zero_at_its_target():
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    target = box_map_target(_random_boxes(3, 3), mask)
    assert map_loss(target.clamp(min=1e-30).log(), target, mask.flatten(1)).abs() < 1e-6
