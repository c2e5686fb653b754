"""The web page of `epmvg demo`. Only where gradio is installed is the page itself made."""

import sys

import pytest
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from epmvg_hf.cli import app
from epmvg_hf.commands.demo import COLUMNS, MAX_EXPRESSIONS, SHOWN_SIDE, ground_lines, make_page
from tests.fixtures.models import tiny_model

EXPRESSIONS = ["the red circle", "the dog on the left"]
TEXT = "the red circle\n\n  the dog on the left \n"


@pytest.fixture
def folder(tmp_path, processor) -> str:
    tiny_model(score_head=True).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def grounder(folder):
    return pipeline("visual-grounding", model=folder, device="cpu")


@pytest.fixture
def image(tmp_path) -> Image.Image:
    """An image whose EXIF orientation asks for a quarter turn: displayed, it is 40 x 60 pixels (width x height)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "image.png", exif=exif)
    return Image.open(tmp_path / "image.png")


def test_a_box_for_each_line(grounder, image):
    picture, rows = ground_lines(grounder, image, TEXT)
    assert picture.size == (40, 60)
    for row, result in zip(rows, grounder(image, EXPRESSIONS), strict=True):
        box = list(result["box"].values())
        score = pytest.approx(result["score"], abs=1e-3)
        assert row == [result["text"], score, *(pytest.approx(value, abs=0.051) for value in box)]
    with pytest.raises(ValueError, match=r"`text` of an image is \[\]"):
        ground_lines(grounder, image, " \n")
    with pytest.raises(ValueError, match=f"17 expressions are too many, expected at most {MAX_EXPRESSIONS}"):
        ground_lines(grounder, image, "a dog\n" * 17)


def test_what_is_below_the_threshold_has_no_box(grounder, image):
    _, rows = ground_lines(grounder, image, TEXT, threshold=1.0)
    assert [row[2:] for row in rows] == [[None] * 4] * 2 and all(0 <= row[1] < 1 for row in rows)


def test_a_large_picture_is_shown_smaller_and_its_boxes_are_those_of_the_image(grounder):
    large = Image.effect_noise((3000, 2000), 80).convert("RGB")
    picture, rows = ground_lines(grounder, large, "a dog")
    assert picture.size == (SHOWN_SIDE, round(SHOWN_SIDE * 2 / 3))
    assert rows[0][2:] == pytest.approx(list(grounder(large, "a dog")["box"].values()), abs=0.051)


def test_transparent_ground_is_drawn_white(grounder):
    picture, _ = ground_lines(grounder, Image.new("RGBA", (400, 600), (0, 0, 0, 0)), TEXT)
    assert (255, 255, 255) in [colour for _, colour in picture.getcolors(10_000)]
    assert max(picture.getcolors(10_000))[1] == (255, 255, 255)


def test_the_page(grounder, image):
    gradio = pytest.importorskip("gradio")
    page = make_page(grounder)
    assert page.input_components[0].image_mode is None  # gradio's own conversion would make what is transparent black
    picture, rows, seconds = page.fn(image, TEXT, 0.0)
    table = page.output_components[1].postprocess(rows)
    assert picture.size == (40, 60) and seconds.endswith(" s")
    assert table.headers == COLUMNS and table.data == rows
    with pytest.raises(gradio.Error, match="`image` is a value of type NoneType, which cannot be read"):
        page.fn(None, TEXT, 0.0)


def test_gradio_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", folder])
    assert result.exit_code == 1
    assert (
        result.stderr.splitlines()[-1] == 'Error: ImportError: epmvg demo needs gradio: pip install "epmvg_hf[demo]"'
    )
