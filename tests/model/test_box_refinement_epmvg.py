import math

import pytest
import torch

from epmvg_hf import EpmVGForVisualGrounding
from epmvg_hf.model.box_refinement_epmvg import EpmVGBoxRefinement, sample_around
from tests.fixtures.models import tiny_config, tiny_model


def _between_cells(rows: list[list[float]], x: float, y: float) -> float:
    """The value at (x, y) in [0, 1] of a canvas, interpolated between the centres of the four cells around it."""
    value = 0.0
    at = [min(max(v * len(cells) - 0.5, 0), len(cells) - 1) for v, cells in ((x, rows[0]), (y, rows))]
    for row in range(len(rows)):
        for column in range(len(rows[0])):
            share = max(0, 1 - abs(at[0] - column)) * max(0, 1 - abs(at[1] - row))
            value += share * rows[row][column]
    return value


def test_points_in_and_around_boxes_equal_a_float64_loop():
    generator = torch.Generator().manual_seed(0)
    maps, boxes = torch.rand(3, 2, 5, 7, generator=generator), torch.rand(3, 4, generator=generator)
    found = sample_around(maps, boxes)
    assert found.shape == (3, 2, 7, 7)
    for box in range(3):
        cx, cy, w, h = boxes[box].double().tolist()
        for channel in range(2):
            rows = maps[box, channel].double().tolist()
            expected = [
                [_between_cells(rows, cx + w * (i - 3) / 4, cy + h * (j - 3) / 4) for i in range(7)] for j in range(7)
            ]
            torch.testing.assert_close(
                found[box, channel].double(), torch.tensor(expected).double(), atol=1e-5, rtol=0
            )


def test_corrections_are_those_of_r_cnn():
    """Boxes move by shares of their size and are stretched by the exponential of the correction, within the canvas."""
    refinement = EpmVGBoxRefinement(tiny_config()).eval()
    torch.nn.init.zeros_(refinement.correction.weight)
    refinement.correction.bias.data = torch.tensor([0.5, -0.25, math.log(2), math.log(0.5)])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.6, 0.4]])
    found = refinement(
        boxes, torch.randn(2, 6, 16), torch.randn(2, 16), torch.randn(2, 6), torch.ones(2, 2, 3, dtype=torch.bool)
    )
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.4, 0.4, 0.2], [1.0, 0.0, 1.0, 0.2]]))


@pytest.mark.parametrize("box_head", ["reg", "map"])
def test_a_new_refinement_leaves_boxes_as_they_are(tmp_path, box_head):
    """Also if a saved model gets it as a new part."""
    settings = {"box_head": box_head, "fusion_type": "decoder"}
    saved = tiny_model(**settings)
    saved.save_pretrained(tmp_path)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 48), "input_ids": torch.randint(5, 19, (2, 6))}
    with torch.no_grad():
        expected = saved(**inputs).pred_boxes
        config = tiny_config(**settings, box_refinement=True)
        loaded = EpmVGForVisualGrounding.from_pretrained(tmp_path, config=config)
        assert torch.equal(loaded(**inputs).pred_boxes, expected)
        assert loaded.box_refinement.hidden_layer.weight.std() > 0


def test_boxes_and_all_parts_of_the_refinement_learn():
    model = tiny_model(box_head="map", box_refinement=True)
    inputs = {"pixel_values": torch.randn(2, 3, 64, 48), "input_ids": torch.randint(5, 19, (2, 6))}
    model(**inputs, labels=torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.4, 0.2, 0.2]])).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.box_refinement.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.box_head[-1].parameters())
