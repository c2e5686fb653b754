"""Pictures of boxes and labels, looked at pixel by pixel."""

import itertools

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image, ImageColor

from epmvg_hf.evaluation.drawing import COLOURS, HEAT, HEAT_ALPHA, draw_boxes, draw_map

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


# Maps


def test_each_cell_glows_in_its_part_of_the_picture():
    values = np.zeros((2, 5))
    values[1, 3] = 0.4
    picture = np.asarray(draw_map(Image.new("RGB", (500, 80), GRAY), values)).astype(int)
    # In the middle of a cell there is its own colour, and the gray of the image.
    lit, dark = ((1 - HEAT_ALPHA) * 128 + HEAT_ALPHA * np.array(colour) for colour in (HEAT[-1], HEAT[0]))
    assert np.abs(picture[60, 350] - lit).max() < 4
    for row, column in ((20, 350), (60, 250), (60, 450), (20, 50)):
        assert np.abs(picture[row, column] - dark).max() < 4
    brightness = picture.sum(axis=2)
    rows, columns = np.nonzero(brightness == brightness.max())
    assert (rows.mean(), columns.mean()) == pytest.approx((60, 350), abs=25)
    assert not (brightness[:, :250] > brightness.min()).any()


def test_heat_is_in_order_and_between_its_steps():
    shares = np.linspace(0, 1, 256)[None]
    heat = np.asarray(draw_map(Image.new("RGB", (256, 8)), shares * 3))[4] / HEAT_ALPHA
    assert (np.diff(heat @ [0.299, 0.587, 0.114]) > -1.5).all()
    expected = colormaps["inferno"](shares[0])[:, :3] * 255
    assert np.abs(heat - expected).mean() < 12 and np.abs(heat[::64] - expected[::64]).max() < 6


def test_a_map_of_nothing_leaves_a_dark_image_of_any_mode():
    image = Image.effect_noise((30, 20), 80)
    for given in (image, image.convert("RGBA"), image.convert("P")):
        picture = draw_map(given, np.zeros((1, 1)))
        assert picture.mode == "RGB" and picture.size == (30, 20)
        expected = (1 - HEAT_ALPHA) * np.asarray(image)[..., None] + HEAT_ALPHA * np.array(HEAT[0])
        assert np.abs(np.asarray(picture) - expected).max() < 2.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), r"a map must have rows and columns, but its shape is \(3,\)"),
        (np.zeros((0, 3)), r"rows and columns, but its shape is \(0, 3\)"),
        (np.array([[0.5, np.nan]]), "finite numbers from 0, but it has nan to nan"),
        (np.array([[0.5, -0.5]]), "finite numbers from 0, but it has -0.5 to 0.5"),
    ],
)
def test_what_is_no_map(values, message):
    with pytest.raises(ValueError, match=message):
        draw_map(Image.new("RGB", (30, 20)), values)
