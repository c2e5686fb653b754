import io

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader

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


def _row_of(image: PILImage.Image, box: list[float] | None, **saving) -> Dataset:
    file = io.BytesIO()
    image.save(file, **saving)
    columns = {"image": [{"bytes": file.getvalue(), "path": None}], "image_id": ["a"], "expression": ["it"]}
    return Dataset.from_dict({**columns, "box": [box]}).cast_column("image", Image())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "size, side, reduced",
    [
        ((400, 300), 200, (200, 150)),
        ((403, 301), 100, (101, 76)),
        ((300, 400), 51, (75, 100)),
        ((1601, 9), 200, (201, 2)),
        ((400, 300), 201, (400, 300)),
        ((40, 30), 100, (40, 30)),
    ],
)
def test_boxes_follow_the_size_at_which_a_jpeg_is_decoded(size, side, reduced, mode):
    image = PILImage.new(mode, size)
    box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1]]
    image.paste("white", tuple(box))
    dataset = _row_of(image, box, format="JPEG", quality=95)
    group = ImageGroups(dataset, decoded_side=side)[0]
    assert group.image.size == reduced and group.image.mode == mode and group.boxes.dtype == np.float32
    rows, columns = (np.array(group.image.convert("L")) > 127).nonzero()
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(group.boxes[0], seen, atol=1)
    assert ImageGroups(dataset)[0].image.size == size
    assert ImageGroups(dataset)[0].boxes.tolist() == [box]


def test_what_is_no_upright_jpeg_on_this_machine_is_decoded_as_ever():
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    exif = PILImage.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    png, turned = _row_of(noise, [1, 2, 3, 4], format="PNG"), _row_of(noise, None, format="JPEG", exif=exif)
    missing = Dataset.from_dict({**png.remove_columns("image")[:], "image": [None]}).cast_column("image", Image())
    for dataset, size in ((png, (40, 30)), (turned, (30, 40)), (missing, None)):
        expected, group = ImageGroups(dataset)[0], ImageGroups(dataset, decoded_side=10)[0]
        assert group.image == expected.image
        assert size is None or group.image.size == size
        np.testing.assert_array_equal(group.boxes, expected.boxes)


def test_a_jpeg_file_is_decoded_to_the_mode_of_the_column(tmp_path):
    path = tmp_path / "large.jpg"
    PILImage.new("L", (400, 300), 99).save(path)
    columns = {"image": [str(path)], "image_id": ["a"], "expression": ["it"]}
    dataset = Dataset.from_dict(columns).cast_column("image", Image(mode="RGB"))
    image = ImageGroups(dataset, decoded_side=100)[0].image
    assert image.mode == "RGB" and image.size == (100, 75) and image.getpixel((0, 0)) == (99, 99, 99)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        ImageGroups(dataset, decoded_side=100)[0]
