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
def image(tmp_path) -> str:
    """The file of an image whose EXIF orientation turns it: displayed, it is 40 pixels wide and 60 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((60, 40), 80).convert("RGB").save(tmp_path / "image.png", exif=exif)
    return str(tmp_path / "image.png")


def test_a_box_for_each_line(grounder, image):
    picture, rows = ground_lines(grounder, image, TEXT)
    assert picture.size == (40, 60)
    for row, result in zip(rows, grounder(image, EXPRESSIONS), strict=True):
        box = list(result["box"].values())
        score = pytest.approx(result["score"], abs=1e-3)
        assert row == [result["text"], score, *(pytest.approx(value, abs=0.051) for value in box)]
    for arguments in ((image, " \n"), (None, "a dog")):
        with pytest.raises(ValueError, match="expected a picture and at least one expression"):
            ground_lines(grounder, *arguments)
    with pytest.raises(ValueError, match=f"17 expressions are too many, expected at most {MAX_EXPRESSIONS}"):
        ground_lines(grounder, image, "a dog\n" * 17)


def test_what_is_below_the_threshold_has_no_box(grounder, image):
    _, rows = ground_lines(grounder, image, TEXT, threshold=1.0)
    assert [row[2:] for row in rows] == [[None] * 4] * 2 and all(0 <= row[1] < 1 for row in rows)


def test_a_file_that_is_no_image_gets_a_sentence(grounder, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"^text\.png is no image that can be read$"):
        ground_lines(grounder, str(tmp_path / "text.png"), TEXT)


def test_a_large_picture_is_shown_smaller_and_its_boxes_are_those_of_the_image(grounder, tmp_path):
    large = str(tmp_path / "large.jpg")
    Image.effect_noise((3000, 2000), 80).convert("RGB").save(large)
    picture, rows = ground_lines(grounder, large, "a dog")
    assert picture.size == (SHOWN_SIDE, round(SHOWN_SIDE * 2 / 3))
    assert rows[0][2:] == pytest.approx(list(grounder(large, "a dog")["box"].values()), abs=0.051)


def test_transparent_ground_is_drawn_white(grounder, tmp_path):
    Image.new("RGBA", (400, 600), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture, _ = ground_lines(grounder, str(tmp_path / "clear.png"), TEXT)
    assert (255, 255, 255) in [colour for _, colour in picture.getcolors(10_000)]
    assert max(picture.getcolors(10_000))[1] == (255, 255, 255)


def test_the_page(grounder, image):
    gradio = pytest.importorskip("gradio")
    from gradio.data_classes import ImageData

    page = make_page(grounder)
    assert page.input_components[0].preprocess(ImageData(path=image)) == image
    picture, rows, seconds = page.fn(image, TEXT, 0.0)
    table = page.output_components[1].postprocess(rows)
    assert picture.size == (40, 60) and seconds.endswith(" s")
    assert table.headers == COLUMNS and table.data == rows
    with pytest.raises(gradio.Error, match="expected a picture and at least one expression"):
        page.fn(None, TEXT, 0.0)


def test_gradio_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", folder])
    assert result.exit_code == 1
    assert (
        result.stderr.splitlines()[-1] == 'Error: ImportError: epmvg demo needs gradio: pip install "epmvg_hf[demo]"'
    )
