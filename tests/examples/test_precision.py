"""The benchmark that compares precisions, and int8 by torchao."""

import numpy as np
import precision as example
import pytest
import torch
from torch import nn

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor, load_grounding_dataset
from tests.fixtures.models import tiny_model


@pytest.fixture
def folder(tmp_path, processor):
    model = tiny_model(box_head="map")
    # These weights are zero in a new model, whose boxes would all have one size and nearly the same centre.
    nn.init.normal_(model.box_head[-1].weight)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_int8_keeps_the_boxes_within_a_pixel(folder):
    """Every linear layer of both towers, fusion and head is rounded, and little of the boxes is."""
    dataset = load_grounding_dataset("shapes", split="test", num_images=4)
    processor = EpmVGProcessor.from_pretrained(folder)
    exact, seconds = example.predict(EpmVGForVisualGrounding.from_pretrained(folder), processor, dataset, 2)
    assert exact.shape == (len(dataset), 4) and seconds > 0
    assert exact.std(axis=0).min() > 1  # pixels: there is something to lose

    model = example.load(str(folder), "int8")
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 20 and all(weight.qdata.dtype == torch.int8 for weight in linear)
    boxes, _ = example.predict(model, processor, dataset, 2)
    assert 0 < np.abs(boxes - exact).mean() < 0.5 and np.abs(boxes - exact).max() < 3


def test_there_is_a_row_for_each_precision(folder):
    dataset = load_grounding_dataset("shapes", split="test", num_images=4).select(range(20))
    precisions = ["bfloat16", "float16", "int8"]
    rows = example.measure(torch.device("cpu"), str(folder), dataset, precisions, batch_size=2)
    assert [row["precision"] for row in rows] == ["float32", *precisions]
    off = {row["precision"]: row["largest"] for row in rows}
    assert off["float32"] == 0
    for precision, largest in (("bfloat16", 3), ("float16", 0.5), ("int8", 3)):
        assert 0 < off[precision] < largest
