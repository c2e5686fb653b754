"""The page of the worst errors, read as a browser does."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from epmvg_hf.evaluation.accuracy_by_group import GroupAccuracy
from epmvg_hf.evaluation.error_report import PICTURE_SIDE, make_error_report

WRONG, TRUE = [5.0, 5.0, 25.0, 25.0], [100.0, 80.0, 180.0, 150.0]
IMAGE = Image.new("RGB", (200, 160), "olive")


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the text of each caption."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.captions: list[str] = []
        self._in_caption = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "figcaption":
            self.captions.append("")
            self._in_caption = True

    def handle_endtag(self, tag):
        self._in_caption &= tag != "figcaption"

    def handle_data(self, data):
        self.text += data
        if self._in_caption:
            self.captions[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def rows(self) -> list[str]:
        return [figure["id"] for figure in self.all("figure")]


def report(boxes, true_boxes, image=IMAGE, **changes) -> Page:
    count = len(boxes)
    arguments = {
        "images": [image] * count,
        "image_ids": [f"image {number}" for number in range(count)],
        "expressions": [f"thing {number}" for number in range(count)],
        **changes,
    }
    return Page(make_error_report("Errors", boxes=np.array(boxes, float), true_boxes=true_boxes, **arguments))


def test_counts_shares_and_groups_are_shown():
    boxes = [WRONG, TRUE, [0, 0, 200, 160], TRUE]
    groups = {"phrase_types": [GroupAccuracy("people", 3, 1 / 3)]}
    page = report(boxes, [TRUE, TRUE, TRUE, None], groups=groups)
    text = " ".join(page.text.split())
    assert "3 expressions with a true box on 3 images: Acc@0.5 33.3 %" in text
    assert "Left out here: 1 expressions without a true box" in text
    for row in ("wrong object 1 33.3 %", "beside 0 0.0 %", "too large 1 33.3 %", "right 1 33.3 %", "people 3 33.3 %"):
        assert row in text
    assert "Accuracy by phrase types" in text
    assert page.rows() == ["row-0", "row-2"]  # neither what is right nor what has no true box


def test_every_link_leads_to_a_place_on_the_page_and_nothing_leads_out():
    page = report([WRONG, [90, 20, 170, 120], TRUE], [TRUE] * 3)
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for attributes in page.all("a")]
    assert set(links) <= {f"#{place}" for place in places}
    assert {"#wrong-object", "#row-0"} <= set(links) and "#beside" in links
    loaded = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in loaded)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_pictures_are_small_and_boxes_are_in_pixels_of_the_image():
    page = report([WRONG], [TRUE], image=Image.new("L", (3000, 1500), 90), scores=np.array([0.25]))
    (picture,) = (image for image in page.all("image"))
    opened = Image.open(io.BytesIO(base64.b64decode(picture["href"].partition(",")[2])))
    assert opened.format == "JPEG" and opened.size == (PICTURE_SIDE, PICTURE_SIDE // 2)
    (shown,) = (svg for svg in page.all("svg") if svg.get("role") == "img")
    assert shown["viewbox"] == "0 0 3000 1500" and (picture["width"], picture["height"]) == ("3000", "1500")
    assert shown["aria-label"] == "Image image 0 with the predicted and the true box of: thing 0"
    drawn = {rect["class"]: [float(rect[side]) for side in ("x", "y", "width", "height")] for rect in page.all("rect")}
    assert drawn["predicted"] == [5, 5, 20, 20] and drawn["true"] == [100, 80, 80, 70]
    assert " ".join(page.captions[0].split()) == "thing 0 IoU 0.00, score 0.25 image image 0, row 0"


def test_16_bits_and_transparency_can_be_shown():
    for image in (Image.fromarray(np.full((40, 60), 100 * 257, np.uint16)), Image.new("RGBA", (60, 40))):
        assert len(report([WRONG], [TRUE], image=image).all("image")) == 1


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} & 'x'"])
def test_texts_of_unknown_origin_stay_texts(text):
    groups = {text: [GroupAccuracy(text, 1, 0.0)]}
    page = report([WRONG], [TRUE], expressions=[text], image_ids=[text], groups=groups)
    plain = report([WRONG], [TRUE], groups={"x": [GroupAccuracy("x", 1, 0.0)]})
    assert [(tag, sorted(attributes)) for tag, attributes in page.tags] == [
        (tag, sorted(attributes)) for tag, attributes in plain.tags
    ]
    assert page.captions[0].split("IoU")[0].strip() == text and page.text.count(text) == 4


def test_the_worst_of_each_image_come_before_further_ones():
    """Rows 0 to 3 have no overlap, and the first image has three of them."""
    boxes = [WRONG, WRONG, WRONG, WRONG, [170, 140, 199, 159]]
    changes = {"image_ids": ["a", "a", "a", "b", "c"], "scores": np.array([0.1, 0.9, 0.5, 0.3, 0.8])}
    assert report(boxes, [TRUE] * 5, **changes).rows() == ["row-1", "row-3", "row-4", "row-2", "row-0"]
    page = report(boxes, [TRUE] * 5, **changes, worst=3)
    assert page.rows() == ["row-1", "row-3", "row-4"] and "The worst 3 of them:" in page.text


def test_only_images_that_are_shown_are_read():
    class Images(list):
        read: list[int] = []  # noqa: RUF012

        def __getitem__(self, row):
            self.read.append(row)
            return super().__getitem__(row)

    images = Images([IMAGE] * 4)
    report([TRUE, WRONG, TRUE, WRONG], [TRUE] * 4, images=images, worst=1)
    assert images.read == [1]


def test_a_model_without_errors():
    page = report([TRUE], [TRUE])
    assert "No box is wrong." in page.text and page.rows() == []


def test_the_page_adapts_to_small_and_dark_screens():
    html = make_error_report("Errors", [IMAGE], ["a"], ["b"], np.array([WRONG]), [TRUE])
    assert html.startswith("<!DOCTYPE html>")
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    assert len(re.findall("<style>", html)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expressions": ["x"]}, "there are 2 images, 2 image_ids, 1 expressions, 2 boxes, 2 true_boxes, expected"),
        ({"scores": np.array([0.5])}, "2 true_boxes, 1 scores, expected equally many"),
    ],
)
def test_lengths_that_differ_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        report([WRONG, WRONG], [TRUE, TRUE], **changes)
