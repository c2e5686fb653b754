import math

import pytest
import torch

from epmvg_hf.evaluation.modality_gap import modality_gap


def _expected(images: torch.Tensor, texts: torch.Tensor, image_index: list[int]) -> dict[str, float]:
    """The expected values, by loops over Python floats."""
    images, texts = (
        [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in embeds.double().tolist()]
        for embeds in (images, texts)
    )
    squares = 0.0
    for k in range(len(images[0])):
        squares += (sum(row[k] for row in images) / len(images) - sum(row[k] for row in texts) / len(texts)) ** 2
    matching, others = [], []
    for text, own in zip(texts, image_index, strict=True):
        for number, image in enumerate(images):
            cosine = sum(x * y for x, y in zip(image, text, strict=True))
            (matching if number == own else others).append(cosine)
    return {
        "gap": math.sqrt(squares),
        "alignment": sum(matching) / len(matching),
        "mismatch": sum(others) / len(others),
    }


def test_equals_a_float64_loop():
    generator = torch.Generator().manual_seed(0)
    # Not normalised, with offsets that make a gap. Image 1 has no expression, image 2 has three.
    images = 3 * torch.randn(4, 6, generator=generator) + 1
    texts = torch.randn(6, 6, generator=generator) - 0.5
    image_index = [0, 2, 2, 3, 2, 0]
    measured = modality_gap(images, texts, torch.tensor(image_index))
    assert {name: value.item() for name, value in measured.items()} == pytest.approx(
        _expected(images, texts, image_index), abs=1e-6
    )
    in_order = modality_gap(images, texts[:4])
    assert {name: value.item() for name, value in in_order.items()} == pytest.approx(
        _expected(images, texts[:4], [0, 1, 2, 3]), abs=1e-6
    )


def test_known_cases():
    corners = torch.eye(4)
    same = modality_gap(corners, 5 * corners.bfloat16())
    assert {name: value.item() for name, value in same.items()} == {"gap": 0, "alignment": 1, "mismatch": 0}
    # Two opposite points are as far apart as two modalities can be.
    opposite = modality_gap(torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[-1.0, 0.0]] * 2))
    assert {name: value.item() for name, value in opposite.items()} == {"gap": 2, "alignment": -1, "mismatch": -1}
    assert all(value.dtype == torch.float32 for value in same.values())


def test_one_image_has_no_mismatch():
    measured = modality_gap(torch.ones(1, 2), torch.eye(2), torch.tensor([0, 0]))
    assert measured["mismatch"].isnan()
    assert measured["alignment"].item() == pytest.approx(math.sqrt(0.5))
