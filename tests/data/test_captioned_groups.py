import numpy as np
import pytest
from torch.utils.data import DataLoader

from epmvg_hf import ImageGroups
from epmvg_hf.data.captioned_groups import CaptionedGroups
from tests.fixtures.rows import coloured_rows


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


def test_boxes_of_the_further_images_are_kept():
    further = coloured_rows(["x", "y"])
    mixed = CaptionedGroups(ImageGroups(coloured_rows(["a"])), ImageGroups(further), ratio=2, seed=0)
    shown = {mixed[index].image_id: mixed[index].boxes.tolist() for index in (1, 2)}
    assert shown == {row["image_id"]: [row["box"]] for row in further}


def test_a_batch_has_its_labelled_images_first():
    """Runs with a seed give other numbers in another order, because augmentation and dropout draw in it."""
    labelled = ImageGroups(coloured_rows(["a", "b", "c"]))
    captioned = ImageGroups(coloured_rows(["x", "y"]).remove_columns("box"))
    mixed = CaptionedGroups(labelled, captioned, ratio=1, seed=0)
    for workers in (0, 1):
        loader = DataLoader(mixed, 4, sampler=[4, 2, 3, 0, 1, 5], collate_fn=list, num_workers=workers)
        batches = [[group.image_id for group in batch] for batch in loader]
        first, second, third = (mixed[index].image_id for index in (4, 3, 5))
        assert batches == [["c", "a", first, second], ["b", third]]
