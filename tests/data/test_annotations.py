"""Tests of checking rows, and of scaling and cutting their boxes to the image file."""

import math

import numpy as np
import pytest

from epmvg_hf.data.annotations import AnnotatedImage, place_rows

BEYOND = "] is not within the 40 x 20 pixels of a.jpg, so no row of that image is used."


def annotated(*boxes, size=None, expression="a dog", **columns) -> AnnotatedImage:
    rows = [
        {"where": f"a.json, row {number}", "expression": expression, "box": box, **columns}
        for number, box in enumerate(boxes)
    ]
    return AnnotatedImage("a.jpg", "a", size, rows)


def place(box, size=None, stored=(40, 20), **columns):
    """The box as scaled and cut, after making sure that nothing is wrong with it."""
    (row,), problems = place_rows(annotated(box, size=size, **columns), stored)
    assert problems == []
    return row["box"]


def problem(box=(1, 2, 3, 4), size=None, stored=(40, 20), **columns) -> str:
    """What is wrong with the one row, which then is not used."""
    rows, problems = place_rows(annotated(box, size=size, **columns), stored)
    assert rows == [] and len(problems) == 1
    return problems[0]


def test_row():
    rows, problems = place_rows(annotated([1, 2, 3, 4], expression=" A dog ", ref_id="7", ann_id=None), (40, 20))
    assert rows == [{"expression": " A dog ", "box": [1.0, 2.0, 3.0, 4.0], "ref_id": "7", "ann_id": None}]
    assert problems == []
    assert all(type(value) is float for value in rows[0]["box"])


def test_annotation_is_not_changed():
    image = annotated([-0.5, 0, 40.5, 20], size=(40, 20), boxes=[[-0.5, 0, 40.5, 20]])
    place_rows(image, (80, 20))
    assert image == annotated([-0.5, 0, 40.5, 20], size=(40, 20), boxes=[[-0.5, 0, 40.5, 20]])


def test_no_rows():
    for stored in (None, (40, 20), (20, 40)):
        assert place_rows(annotated(size=(40, 20)), stored) == ([], [])


@pytest.mark.parametrize("box", [[0, 0, 40, 20], (0.5, 0.25, 39.5, 19.75), [39.5, 19.5, 40, 20], [0, 0, 1e-3, 1e-3]])
@pytest.mark.parametrize("stored", [(40, 20), None])
def test_boxes_within_the_image_are_kept(box, stored):
    assert place(box, stored=stored) == place(box, (40, 20), stored) == list(box)


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ([-1, -1, 41, 21], [0, 0, 40, 20]),
        ([-0.01, 3, 5, 6], [0, 3, 5, 6]),
        ([39.9, 19.9, 40.4, 20.9], [39.9, 19.9, 40, 20]),
    ],
)
def test_overhang_of_up_to_a_pixel_is_cut(box, cut):
    assert place(box) == cut
    assert place(box, (40, 20), None) == cut  # without image file, of the size it should have


@pytest.mark.parametrize(
    "box", [[0, 0, 41.01, 20], [0, 0, 40, 21.5], [40, 0, 41, 20], [0, 20, 5, 20.5], [100, 100, 200, 200]]
)
def test_box_beyond_the_image(box):
    for size, stored in (None, (40, 20)), ((40, 20), (40, 20)), ((40, 20), None), ((40, 20), (80, 60)):
        text = problem(box, size, stored)
        assert text.startswith("a.json, row 0: the box [") and text.endswith(BEYOND)


def test_box_beyond_makes_no_row_of_the_image_usable():
    rows, problems = place_rows(annotated([0, 0, 4, 4], [0, 0, 50, 4], None, [9, 9, 5, 5]), (40, 20))
    assert rows == []
    assert [text.split(":")[0] for text in problems] == ["a.json, row 1", "a.json, row 3"]


def test_other_rows_of_an_image_are_used():
    rows, problems = place_rows(annotated([0, 0, 4, 4], [9, 9, 5, 5], [-2, 0, 4, 4], [1, 1, 2, 2]), (40, 20))
    assert [row["box"] for row in rows] == [[0, 0, 4, 4], [1, 1, 2, 2]]
    assert [text.split(":")[0] for text in problems] == ["a.json, row 1", "a.json, row 2"]


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [5, 9, 9, 5], [0, 0, 0, 0]])
def test_empty_and_inverted_boxes(box):
    assert "is empty or inverted, expected xmin < xmax and ymin < ymax." in problem(box)


@pytest.mark.parametrize("box", [[-1.01, 0, 5, 5], [0, -7, 5, 5], [-1, 0, 0, 5], [0, -0.5, 5, -0.25]])
@pytest.mark.parametrize("stored", [(40, 20), None])
def test_boxes_that_start_outside(box, stored):
    assert "starts outside the image." in problem(box, stored=stored)


NO_NUMBERS = [math.nan, math.inf, -math.inf, "3", None, True, 3j, [3], 10**400, -(10**400), 1e300, np.float32(3)]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("value", NO_NUMBERS, ids=type)
def test_no_numbers(index, value):
    box = [1, 2, 3, 4]
    box[index] = value
    for size in (None, (40, 20)):
        text = problem(box, size)
        assert text.startswith("a.json, row 0: the box is [") and text.endswith("], expected 4 finite numbers.")


NO_BOXES = ["1234", "[1, 2, 3, 4]", 3, True, [], [1, 2, 3], [1, 2, 3, 4, 5], dict.fromkeys(range(4)), [[1, 2, 3, 4]]]


@pytest.mark.parametrize("box", NO_BOXES)
def test_no_boxes(box):
    assert "expected 4 finite numbers." in problem(box, (40, 20))


@pytest.mark.parametrize("expression", ["", " ", "\n\t", None, 5, ["a dog"], b"a dog", "\ud83d", "a dog \ude00"])
def test_no_words(expression):
    assert problem(expression=expression).startswith("a.json, row 0: the expression is ")
    assert problem(box=None, expression=expression).endswith(", expected words.")


@pytest.mark.parametrize("expression", ["a", "一只狗", "chien à gauche", "\U0001f415"])
def test_words(expression):
    assert place([1, 2, 3, 4], expression=expression) == [1, 2, 3, 4]


def test_messages_are_short():
    assert len(problem([0] * 10_000)) < 200
    assert len(problem("0" * 10_000)) < 200
    assert len(problem(expression=["a"] * 10_000)) < 200


# Without box


def test_rows_may_have_no_box():
    for size, stored in ((None, None), (None, (40, 20)), ((40, 20), (80, 60)), ((40, 20), None)):
        rows, problems = place_rows(annotated(None, [0, 0, 4, 4], size=size, boxes=None), stored)
        assert rows[0] == {"expression": "a dog", "box": None, "boxes": None}
        assert len(rows) == 2 and problems == []


# Sizes


def test_boxes_are_scaled_per_axis():
    assert place([4, 5, 40, 20], (40, 20), (80, 20)) == [8, 5, 80, 20]
    assert place([4, 5, 40, 20], (40, 20), (60, 50)) == [6, 12.5, 60, 50]
    assert place([4, 5, 40, 20], (40, 20), None) == [4, 5, 40, 20]


def test_overhang_is_measured_in_annotated_pixels():
    assert place([-0.5, 0, 40.9, 20.9], (40, 20), (4000, 2000)) == [0, 0, 4000, 2000]
    assert "not within the 40 x 20 pixels" in problem([0, 0, 41.1, 20], (40, 20), (4, 2))


def test_several_boxes_are_placed_alike():
    boxes = [[-0.5, 0, 4, 4], (10, 10, 40.5, 20)]
    (row,), _ = place_rows(annotated([-0.5, 0, 40.5, 20], size=(40, 20), boxes=boxes), (80, 10))
    assert row["box"] == [0, 0, 80, 10]
    assert row["boxes"] == [[0, 0, 8, 2], [20, 5, 80, 10]]


def test_turned_images():
    text = problem([1, 2, 3, 4], (40, 20), (20, 40))
    assert text == "a.json, row 0: the image a.jpg has 20 x 40 pixels, expected 40 x 20, not turned."
    rows, problems = place_rows(annotated([1, 2, 3, 4], [1, 2, 3, 4], size=(640, 427)), (427, 640))
    assert rows == [] and len(problems) == 1


@pytest.mark.parametrize(("size", "stored"), [((40, 40), (40, 39)), ((40, 20), (40, 35)), ((40, 39), (39, 40))])
def test_images_that_are_almost_square_are_not_taken_for_turned_ones(size, stored):
    assert place([0, 0, *size], size, stored) == [0, 0, *stored]


NO_SIZES = [(0, 20), (40, 0), (-40, 20), (math.nan, 20), (40, math.inf), ("40", "20"), (40, None), (True, 20)]


@pytest.mark.parametrize("size", NO_SIZES)
@pytest.mark.parametrize("stored", [(40, 20), None])
def test_sizes_that_are_none(size, stored):
    text = problem(size=size, stored=stored)
    assert text.startswith("a.json, row 0: the size of a.jpg is (") and text.endswith("expected its width and height.")
