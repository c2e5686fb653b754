"""Pictures of boxes and labels, looked at pixel by pixel."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageColor

from epmvg_hf.evaluation.drawing import COLOURS, draw_boxes

GRAY = (128, 128, 128)


def drawn(size, boxes, labels) -> np.ndarray:
    return np.asarray(draw_boxes(Image.new("RGB", size, GRAY), boxes, labels))


def places_of(picture: np.ndarray, colour: str) -> tuple[int, int, int, int]:
    """xyxy of all pixels of a colour."""
    rows, columns = np.nonzero((picture == ImageColor.getrgb(colour)).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_the_line_is_the_border_of_the_box():
    assert places_of(drawn((100, 60), [[10, 20, 50, 40]], [""]), COLOURS[0]) == (10, 20, 50, 40)
    picture = drawn((100, 60), [[-5, 20, 120, 99.6]], [""])  # what is outside of the image is cut
    assert places_of(picture, COLOURS[0]) == (0, 20, 100, 60)


@pytest.mark.parametrize("size", [(12, 12), (40, 300), (300, 40), (640, 480), (4000, 2969)])
def test_labels_are_as_large_as_the_picture_allows_and_never_outside(size):
    width, height = size
    corners = [[0, 0, width / 3, height / 3], [width * 0.7, height * 0.8, width, height]]
    picture = draw_boxes(Image.new("RGB", size, GRAY), corners, ["a very long expression " * 9, "the dog"])
    assert picture.size == size
    # Where letters are legible, those of a large picture are larger.
    letters = (np.asarray(picture) < 60).all(axis=2)
    if min(size) >= 40:
        assert letters.any(axis=0).sum() > 10
    if size[0] == 4000:
        assert letters.any(axis=1).sum() > 100


def test_labels_of_one_box_do_not_cover_each_other():
    labels = ["one", "two", "three", "four"]
    picture = drawn((300, 200), [[20, 50, 200, 150]] * 4, labels)
    # The lines of the last box cover those of the others, of which only the labels are seen.
    spans = sorted(places_of(picture, colour)[1::2] for colour in COLOURS[:3])
    assert all(high - low >= 7 for low, high in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_a_label_for_each_box():
    with pytest.raises(ValueError):
        drawn((10, 10), [[0, 0, 5, 5]], [])
