import halve_model
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor
from tests.fixtures.models import tiny_model


def test_half_on_disk_and_float32_in_memory(tmp_path, processor, capsys):
    model = tiny_model(box_head="map", score_head=True)
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "README.md").write_text("the card")
    halve_model.main([str(tmp_path / "whole"), str(tmp_path / "half")])

    on_disk = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in on_disk.values() if weight.is_floating_point()} == {torch.float16}
    halved = EpmVGForVisualGrounding.from_pretrained(tmp_path / "half")
    assert halved.dtype == torch.float32 and (tmp_path / "half" / "README.md").read_text() == "the card"
    inputs = EpmVGProcessor.from_pretrained(tmp_path / "half")(images=Image.new("RGB", (40, 30)), text="the dog")
    with torch.no_grad():
        torch.testing.assert_close(halved(**inputs).pred_boxes, model(**inputs).pred_boxes, atol=1e-3, rtol=0)
    folder, size, unit = capsys.readouterr().out.rsplit(maxsplit=2)
    assert folder == f"{tmp_path / 'half'}:" and 0 < float(size) < 1 and unit == "MB"


def test_what_half_precision_cannot_hold_is_named(tmp_path, processor):
    model = tiny_model(box_head="map")
    with torch.no_grad():
        model.box_head[0].bias[0] = 1e6
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"box_head\.0\.bias has numbers that float16 cannot hold"):
        halve_model.main([str(tmp_path), str(tmp_path / "half")])
    assert not (tmp_path / "half").exists()
