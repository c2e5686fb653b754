import math

import numpy as np
import pytest
import torch

from epmvg_hf.evaluation.modality_gap import modality_gap, modality_probe


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


def _expected_probe(images: np.ndarray, texts: np.ndarray, image_index: np.ndarray) -> float:
    """By least squares on copies: as many of each image as there are texts, and the other way round."""
    images, texts = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts))
    shares = []
    for trained in (0, 1):
        known = [images[np.arange(len(images)) % 2 == trained], texts[image_index % 2 == trained]]
        points = np.concatenate([np.repeat(known[0], len(known[1]), 0), np.repeat(known[1], len(known[0]), 0)])
        sides = np.repeat([1.0, -1.0], len(known[0]) * len(known[1]))
        # The regularisation of the weighted mean, as further rows of the system of equations.
        count, width = len(sides) / 2, points.shape[1] + 1
        system = np.concatenate([np.c_[points, np.ones(len(points))], math.sqrt(1e-3 * count) * np.eye(width)])
        plane = np.linalg.lstsq(system, np.concatenate([sides, np.zeros(width)]), rcond=None)[0]
        others = [images[np.arange(len(images)) % 2 != trained], texts[image_index % 2 != trained]]
        for rows, side in zip(others, (1, -1), strict=True):
            shares.append(np.mean(np.sign(rows @ plane[:-1] + plane[-1]) == side))
    return float(np.mean(shares))


def test_the_probe_equals_least_squares_on_repeated_rows():
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(20, 6)) + 0.3, generator.normal(size=(50, 6)) - 0.3
    image_index = generator.integers(0, 20, 50)
    measured = modality_probe(*map(torch.tensor, (images, texts, image_index)))
    assert measured == pytest.approx(_expected_probe(images, texts, image_index), abs=1e-12)
    assert 0.55 < measured < 0.95  # neither case is trivial


def test_the_probe_tells_a_gap_from_none():
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(400, 8, generator=generator)
    apart = torch.eye(8)[0] * 20
    assert modality_probe(embeds + apart, embeds - apart) == 1
    assert abs(modality_probe(embeds[:200], embeds[200:]) - 0.5) < 0.1
    # As many expressions of one image as of all others do not make it a better guess to say "expression".
    many = torch.cat([embeds[200:], embeds[200:].repeat(5, 1)])
    assert abs(modality_probe(embeds[:200], many, torch.arange(200).repeat(6)) - 0.5) < 0.1
