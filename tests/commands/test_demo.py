"""The web page of `epmvg demo`. Only where gradio is installed is the page itself made."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageColor
from transformers import pipeline
from typer.testing import CliRunner

from epmvg_hf.cli import app
from epmvg_hf.commands.demo import MAP_SIDE, MAX_EXPRESSIONS, SHOWN_SIDE, ground_lines, make_page
from epmvg_hf.commands.demo_answer import COLUMNS, describe
from epmvg_hf.evaluation.drawing import COLOURS
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
    picture, rows, maps = ground_lines(grounder, image, TEXT)
    assert picture.size == (40, 60) and maps == []
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
    _, rows, _ = ground_lines(grounder, image, TEXT, threshold=1.0)
    assert [row[2:] for row in rows] == [[None] * 4] * 2 and all(0 <= row[1] < 1 for row in rows)
    assert describe(rows, [], 0.1).count('<td colspan="4">not found</td>') == 2


def test_a_map_for_each_line(processor, tmp_path):
    model = tiny_model(box_head="map", score_head=True)
    grounder = pipeline("visual-grounding", model=model, processor=processor, device="cpu")
    large = Image.effect_noise((900, 600), 80).convert("RGB")
    large.save(tmp_path / "large.png")
    boxes = [list(result["box"].values()) for result in grounder(large, EXPRESSIONS)]
    for threshold in (0.0, 1.0):
        _, _, maps = ground_lines(grounder, str(tmp_path / "large.png"), TEXT, threshold)
        assert [expression for _, expression in maps] == EXPRESSIONS
        for (picture, _), box, colour in zip(maps, boxes, COLOURS, strict=False):
            assert picture.size == (MAP_SIDE, round(MAP_SIDE * 2 / 3))
            rows, columns = np.nonzero((np.asarray(picture) == ImageColor.getrgb(colour)).all(axis=2))
            if threshold:
                assert not len(rows)
            else:
                sides = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert sides == pytest.approx([side * MAP_SIDE / 900 for side in box], abs=1)


def test_the_answer_is_a_table_and_maps_that_load_nothing():
    rows = [["<b>the dog</b>", 0.5, 1.0, 2.0, 30.25, 40.0], ["a cat", None, None, None, None, None]]
    text = describe(rows, [(Image.new("RGB", (3, 2)), row[0]) for row in rows], seconds=0.25)
    assert "<td>&lt;b&gt;the dog&lt;/b&gt;</td><td>0.500</td><td>1.0</td><td>2.0</td><td>30.2</td>" in text
    assert '<td>a cat</td><td></td><td colspan="4">not found</td>' in text and "This took 0.25 s." in text
    assert text.count("<figure>") == 2 and "<figcaption>&lt;b&gt;the dog&lt;/b&gt;</figcaption>" in text
    assert text.count('src="data:') == text.count("src=") == 2 and "<b>" not in text
    assert "<figure>" not in describe(rows, [], seconds=0.25)


def test_a_file_that_is_no_image_gets_a_sentence(grounder, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"^text\.png is no image that can be read$"):
        ground_lines(grounder, str(tmp_path / "text.png"), TEXT)


def test_a_large_picture_is_shown_smaller_and_its_boxes_are_those_of_the_image(grounder, tmp_path):
    large = str(tmp_path / "large.jpg")
    Image.effect_noise((3000, 2000), 80).convert("RGB").save(large)
    picture, rows, _ = ground_lines(grounder, large, "a dog")
    assert picture.size == (SHOWN_SIDE, round(SHOWN_SIDE * 2 / 3))
    assert rows[0][2:] == pytest.approx(list(grounder(large, "a dog")["box"].values()), abs=0.051)


def test_transparent_ground_is_drawn_white(grounder, tmp_path):
    Image.new("RGBA", (400, 600), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture, *_ = ground_lines(grounder, str(tmp_path / "clear.png"), TEXT)
    assert (255, 255, 255) in [colour for _, colour in picture.getcolors(10_000)]
    assert max(picture.getcolors(10_000))[1] == (255, 255, 255)


def test_the_page(grounder, image):
    gradio = pytest.importorskip("gradio")
    from gradio.data_classes import ImageData

    page = make_page(grounder)
    assert page.input_components[0].preprocess(ImageData(path=image)) == image
    picture, text = page.fn(image, TEXT, 0.0)
    assert picture.size == (40, 60)
    assert all(f">{words}<" in text for words in COLUMNS + EXPRESSIONS) and "<figure>" not in text
    with pytest.raises(gradio.Error, match="expected a picture and at least one expression"):
        page.fn(None, TEXT, 0.0)


def test_gradio_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", folder])
    assert result.exit_code == 1
    assert (
        result.stderr.splitlines()[-1] == 'Error: ImportError: epmvg demo needs gradio: pip install "epmvg_hf[demo]"'
    )
