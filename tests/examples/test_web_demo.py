import sys

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from web_demo import ground, make_page

from tests.fixtures.models import tiny_model

EXPRESSIONS = ["the red circle", "the dog on the left"]
TEXT = "the red circle\n\n  the dog on the left \n"


@pytest.fixture
def folder(tmp_path, processor) -> str:
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def image(tmp_path) -> Image.Image:
    """An image whose EXIF orientation asks for a quarter turn: displayed, it is 40 x 60 pixels (width x height)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "image.png", exif=exif)
    return Image.open(tmp_path / "image.png")


def test_a_box_for_each_line(folder, image):
    grounder = pipeline("visual-grounding", model=folder, device="cpu")
    (picture, outlines), rows = ground(grounder, image, TEXT)
    assert picture.size == (40, 60) and [label for _, label in outlines] == EXPRESSIONS
    for (mask, _), row, result in zip(outlines, rows, grounder(image, EXPRESSIONS), strict=True):
        box = list(result["box"].values())
        assert row == [result["text"], *(pytest.approx(value, abs=0.05) for value in box)]
        assert mask.shape == (60, 40) and set(np.unique(mask)) == {0, 1}
        y, x = mask.nonzero()
        assert [x.min(), y.min(), x.max(), y.max()] == pytest.approx(box, abs=1)
    with pytest.raises(ValueError, match=r"`text` of an image is \[\]"):
        ground(grounder, image, " \n")


def test_transparent_ground_is_drawn_white(folder):
    grounder = pipeline("visual-grounding", model=folder, device="cpu")
    (picture, _), _ = ground(grounder, Image.new("RGBA", (40, 60), (0, 0, 0, 0)), TEXT)
    assert picture.getcolors() == [(40 * 60, (255, 255, 255))]


def test_the_page(folder, image):
    gradio = pytest.importorskip("gradio")
    page = make_page(folder, "cpu")
    assert page.input_components[0].image_mode is None  # gradio's own conversion would make what is transparent black
    (picture, outlines), rows = page.fn(image, TEXT)
    # `page.fn` gives what the page is sent; its components say what it shows of that.
    shown = page.output_components[0].postprocess((picture, outlines))
    assert [annotation.label for annotation in shown.annotations] == EXPRESSIONS
    table = page.output_components[1].postprocess(rows)
    assert table.headers == ["expression", "xmin", "ymin", "xmax", "ymax"] and table.data == rows
    with pytest.raises(gradio.Error, match="`image` is a value of type NoneType, which cannot be read"):
        page.fn(None, TEXT)


def test_gradio_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'^web_demo.py needs gradio: pip install "epmvg_hf\[demo\]"$'):
        make_page("outputs/demo")
