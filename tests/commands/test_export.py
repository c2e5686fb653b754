"""`epmvg export`, which makes two programs of a model: one for images and one for expressions."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.exporters import ExportedModel
from typer.testing import CliRunner

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor
from epmvg_hf.cli import app
from epmvg_hf.commands.exported_programs import IMAGE_INPUTS, make_inputs
from tests.fixtures.models import tiny_model


@pytest.fixture
def folder(tmp_path, processor) -> Path:
    model = tiny_model(box_head="map", fusion_type="decoder")
    # These weights are zero in a new model, whose boxes would then all have the same size and nearly the same centre.
    torch.nn.init.normal_(model.box_head[-1].weight)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _with_torch(folder: Path) -> dict[str, Callable]:
    return ExportedModel.from_pretrained(folder, trust_remote_code=True).runners


def _with_plain_onnxruntime(folder: Path) -> dict[str, Callable]:
    def load(name):
        session = pytest.importorskip("onnxruntime").InferenceSession(folder / f"{name}.onnx")
        names = [output.name for output in session.get_outputs()]
        return lambda **inputs: dict(
            zip(names, session.run(None, {k: np.asarray(v) for k, v in inputs.items()}), strict=True)
        )

    return {name: load(name) for name in ("image", "expression")}


def test_a_folder_that_is_not_there_is_named_at_once(tmp_path):
    result = CliRunner().invoke(app, ["export", str(tmp_path / "none"), str(tmp_path / "out")])
    assert result.exit_code == 2 and "there is no folder" in result.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("output_format", "load"), [("torch", _with_torch), ("onnx", _with_plain_onnxruntime)])
def test_two_programs_give_the_boxes_of_the_model(tmp_path, folder, output_format, load):
    if output_format == "onnx":
        pytest.importorskip("onnxscript")
        if torch.ops.aten.adaptive_max_pool2d.default not in torch._decomp.decomposition_table:
            pytest.skip("this torch cannot export adaptive_max_pool2d to ONNX")
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(folder), str(output), "--format", output_format])
    assert result.exit_code == 0, result.output
    differences = re.findall(r"^B \d, N \d, L \d+: largest difference of a box (.+)$", result.stdout, re.M)
    assert len(differences) == 3 and all(float(difference) < 1e-5 for difference in differences)

    # Four images are encoded once. Then their expressions come one after the other.
    programs, processor = load(output), EpmVGProcessor.from_pretrained(output)
    inputs = make_inputs(processor, num_images=4, num_expressions=6)
    with torch.no_grad():
        boxes = EpmVGForVisualGrounding.from_pretrained(folder)(**inputs).pred_boxes
    assert (boxes.amax(0) - boxes.amin(0)).min() > 1e-3
    seen = programs["image"](**{name: inputs[name] for name in IMAGE_INPUTS})
    for row, box in enumerate(boxes):
        tokens = int(inputs["attention_mask"][row].sum())  # those that are not padding
        found = programs["expression"](
            **seen,
            input_ids=inputs["input_ids"][row : row + 1, :tokens],
            attention_mask=inputs["attention_mask"][row : row + 1, :tokens],
            image_index=inputs["image_index"][row : row + 1],
        )
        torch.testing.assert_close(torch.as_tensor(found["pred_boxes"])[0], box, atol=1e-5, rtol=0)
