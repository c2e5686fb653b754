import numpy as np
import pytest

from epmvg_hf import ImageGroups
from epmvg_hf.data.image_groups import CaptionedGroups, group_rows
from tests.fixtures.rows import coloured_rows

IMAGES = ["a", "bb", "a", "ccc", "bb", "a"]


def test_every_row_is_in_one_group():
    groups = ImageGroups(coloured_rows(IMAGES))
    assert len(groups) == 3
    assert [groups[index].row_indices for index in range(3)] == [[0, 2, 5], [1, 4], [3]]
    assert groups[0].boxes[:, 0].tolist() == [0, 2, 5] and groups[0].boxes.dtype == np.float32
    assert groups[1].expressions == ["the dog left", "the dog left"] and groups[1].image.size == (42, 30)


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="lacks the column\\(s\\) expression; it has image, image_id, box"):
        ImageGroups(coloured_rows(["a"]).remove_columns("expression"))


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


def test_some_of_the_expressions():
    group = ImageGroups(coloured_rows(IMAGES))[0].select([2, 0])
    assert group.row_indices == [5, 0] and group.boxes[:, 0].tolist() == [5, 0]
    assert group.expressions == ["the dog left left", "the dog"] and len(group) == 2


def test_captioned_images_take_turns_and_labelled_ones_come_once_an_epoch():
    labelled = ImageGroups(coloured_rows(["a", "b", "a", "c"]))
    captioned = ImageGroups(coloured_rows(["a", "x", "y", "y", "z"]).remove_columns("box"))
    mixed = CaptionedGroups(labelled, captioned, ratio=2 / 3, seed=0)
    assert len(mixed) == 3 + 2
    shown = []
    for epoch in range(4):
        mixed.set_epoch(epoch)
        groups = [mixed[index] for index in (4, 0, 3, 2, 1)]
        with_boxes = [group for group in groups if not np.isnan(group.boxes).any()]
        assert [group.image_id for group in with_boxes] == ["a", "c", "b"]
        without = [group for group in groups if np.isnan(group.boxes).all()]
        # Images of both sets may have the same id; the index counts on through both.
        assert [group.index - 3 for group in without] == [["a", "x", "y", "z"].index(g.image_id) for g in without]
        shown += [group.image_id for group in without]
    # 4 epochs with 2 of 4 images each show every image twice, in turn.
    assert sorted(shown[:4]) == sorted(shown[4:]) == ["a", "x", "y", "z"]
    with pytest.raises(ValueError, match="the caption dataset has no rows"):
        CaptionedGroups(labelled, ImageGroups(coloured_rows(["a"]).select([])), ratio=1, seed=0)
