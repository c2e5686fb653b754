import pytest
import torch
from torch import nn

from epmvg_hf.distillation.losses import feature_loss, relation_loss, teacher_map_target
from epmvg_hf.model.losses import map_loss
from tests.fixtures.loops import check_against_loop, dot, kl, random_embeds, softmax


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
    patches, texts = random_embeds(3, *patch_grid, 5, seed=0), random_embeds(5, 5, seed=1)
    mask = torch.ones(5, *grid, dtype=torch.bool)
    mask[0, :, 4:] = False
    mask[2, :1] = False
    mask[4] = False
    target = teacher_map_target(patches, texts, torch.tensor(image_index), mask, temperature)
    assert target.shape == (5, 24) and target.dtype == torch.float32
    assert (target[~mask.flatten(1)] == 0).all()

    down, across = (_resize_weights(old, new) for old, new in zip(patch_grid, grid, strict=True))
    for n, (text, image) in enumerate(zip(texts.double().tolist(), image_index, strict=True)):
        cosines = [[dot(patch, text) for patch in row] for row in patches[image].double().tolist()]
        kept = [(y, x) for y in range(grid[0]) for x in range(grid[1]) if mask[n, y, x]]
        resized = [
            sum(v * h * cosines[i][j] for i, v in enumerate(down[y]) for j, h in enumerate(across[x])) for y, x in kept
        ]
        expected = [0.0] * 24
        for (y, x), p in zip(kept, softmax([score / temperature for score in resized]), strict=True):
            expected[y * 6 + x] = p
        assert target[n].tolist() == pytest.approx(expected, abs=1e-6)


def test_teacher_map_target_in_order_in_bfloat16_and_under_autocast():
    patches, texts = random_embeds(3, 4, 4, 8, seed=0), random_embeds(3, 8, seed=1)
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
    patches, texts = random_embeds(2, 3, 3, 5, seed=0).requires_grad_(), random_embeds(2, 5, seed=1)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 2:] = False
    target = teacher_map_target(patches, texts, None, mask, 0.1)
    assert not target.requires_grad
    assert map_loss(target.clamp(min=1e-30).log(), target, mask.flatten(1)).abs() < 1e-6


def _relation_by_loop(images, texts, teacher_images, teacher_texts, temperature, teacher_temperature):
    """All arguments are lists of numbers: of either kind for the student, floats for the teacher."""
    student = [[dot(image, text) / temperature for text in texts] for image in images]
    teacher = [[dot(image, text) / teacher_temperature for text in teacher_texts] for image in teacher_images]
    over_texts = sum(kl(softmax(t), s) for t, s in zip(teacher, student, strict=True)) / len(student)
    columns = zip(zip(*teacher, strict=True), zip(*student, strict=True), strict=True)
    over_images = sum(kl(softmax(t), s) for t, s in columns) / len(student[0])
    return (over_texts + over_images) / 2


def _relation_case() -> list[torch.Tensor]:
    """In the teacher's space, 7 expressions lie near their images 0, 0, 0, 1, 3, 3 and 3. Image 2 has none."""
    teacher_images = random_embeds(4, 9, seed=2)
    noise = random_embeds(7, 9, seed=3)
    teacher_texts = nn.functional.normalize(teacher_images[[0, 0, 0, 1, 3, 3, 3]] + 0.5 * noise, dim=-1)
    return [random_embeds(4, 6, seed=0), random_embeds(7, 6, seed=1), teacher_images, teacher_texts]


@pytest.mark.parametrize("temperatures", [(0.1, 0.1), (0.2, 0.05), (0.05, 0.2)])
def test_relation_loss_equals_a_float64_loop(temperatures):
    images, texts, *teacher = _relation_case()
    numbers = [embeds.double().tolist() for embeds in teacher]
    check_against_loop(
        lambda i, t: relation_loss(i, t, *teacher, *temperatures),
        lambda i, t: _relation_by_loop(i, t, *numbers, *temperatures),
        images,
        texts,
    )


def test_relation_loss_can_learn_the_temperature_but_not_the_teacher():
    images, texts, *teacher = _relation_case()
    numbers = [embeds.double().tolist() for embeds in (images, texts, *teacher)]
    check_against_loop(
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
    # Any other space with the same cosines is as good as the teacher's.
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
    return 1 - dot(left, right) / (dot(left, left) * dot(right, right)) ** 0.5


def test_feature_loss_equals_a_float64_loop_at_any_length():
    student = [2 * random_embeds(4, 6, seed=0), 0.5 * random_embeds(7, 6, seed=1)]
    teacher = [random_embeds(4, 6, seed=2), 3 * random_embeds(7, 6, seed=3)]
    numbers = [embeds.double().tolist() for embeds in teacher]
    check_against_loop(
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
