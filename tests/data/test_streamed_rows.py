import numpy as np
import pytest

from epmvg_hf import ImageGroups
from epmvg_hf.data.streamed_rows import group_rows, number_rows
from tests.fixtures.rows import coloured_rows

IMAGES = ["a", "bb", "a", "ccc", "bb", "a"]


def test_rows_of_a_stream_are_grouped_as_those_of_a_dataset():
    dataset = coloured_rows(IMAGES)
    streamed = group_rows([{**row, "row_index": index} for index, row in enumerate(dataset)])
    prepared = ImageGroups(dataset)
    for one, other in zip(streamed, (prepared[index] for index in range(3)), strict=True):
        assert (one.image_id, one.expressions, one.row_indices) == (
            other.image_id,
            other.expressions,
            other.row_indices,
        )
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert one.image.tobytes() == other.image.tobytes()
    unnumbered = group_rows(list(dataset.remove_columns("box")))
    assert [(group.boxes, group.row_indices) for group in unnumbered] == [(None, [])] * 3


def test_no_box_is_nan():
    dataset = coloured_rows(["a", "bb", "a"]).map(
        lambda row, i: {"box": None if i == 2 else row["box"]}, with_indices=True
    )
    for groups in (ImageGroups(dataset), group_rows(list(dataset))):
        assert np.isnan(groups[0].boxes).tolist() == [[False] * 4, [True] * 4]
    assert np.isnan(group_rows([{**dataset[0], "box": None}])[0].boxes).all()


def test_pictures_of_one_id_stay_apart():
    dataset = coloured_rows(IMAGES)
    rows = [{**row, "image_id": image_id} for image_id in (None, "1") for row in dataset]
    groups = group_rows(rows)
    assert [(group.image_id, group.image.width, len(group)) for group in groups] == [
        (image_id, width, count) for image_id in (None, "1") for width, count in ((41, 3), (42, 2), (43, 1))
    ]


@pytest.mark.parametrize("form", ["torch", "undecoded"])
def test_streams_in_other_forms_give_the_same_rows(form):
    dataset = coloured_rows(IMAGES)
    stream = dataset.to_iterable_dataset()
    other = stream.with_format("torch") if form == "torch" else stream.decode(False)
    expected, groups = (group_rows(number_rows(each, 0, 1)) for each in (stream, other))
    for one, another in zip(groups, expected, strict=True):
        assert (one.expressions, one.row_indices) == (another.expressions, another.row_indices)
        assert one.image.tobytes() == another.image.tobytes()
        np.testing.assert_array_equal(one.boxes, another.boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"box": [1.0, 2.0, 254.0, 12.0]},
            r"row 3 \(image_id 'a'\): the box \[1, 2, 254, 12\] is not within the 41 x 30",
        ),
        (
            {"box": [1.0, 2.0, 3.0]},
            r"row 3 \(image_id 'a'\): the box is \[1\.0, 2\.0, 3\.0\], expected 4 finite numbers",
        ),
        ({"expression": " "}, r"row 3 \(image_id 'a'\): the expression is ' ', expected words"),
        ({"image": {"bytes": b"no image", "path": None}}, r"row 3 \(image_id 'a'\): the image cannot be read"),
        ({"image": "/nowhere.png"}, r"row 3 \(image_id 'a'\): the image cannot be read .*nowhere"),
    ],
)
def test_a_bad_row_is_named(change, message):
    row = {**coloured_rows(["a"])[0], "row_index": 3}
    with pytest.raises(ValueError, match=message):
        group_rows([{**row, **change}])
    with pytest.raises(ValueError, match=r"row 3 \(image_id 'a'\) has no image, only image_id, expression, box"):
        group_rows([{name: value for name, value in row.items() if name != "image"}])
