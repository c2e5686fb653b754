import io
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from epmvg_hf import EpmVGDataCollator, GroundingAugmentation, ImageGroups, load_grounding_dataset
from epmvg_hf.data.image_groups import CaptionedGroups


def _dataset(images: list[str]) -> Dataset:
    """One row per entry of `images`, an image id; the box says which row it is."""

    def png(image_id: str) -> bytes:
        file = io.BytesIO()
        PILImage.new("RGB", (40 + len(image_id), 30), (len(image_id) * 20, 0, 0)).save(file, format="PNG")
        return file.getvalue()

    columns = {
        "image": [{"bytes": png(image_id), "path": None} for image_id in images],
        "image_id": images,
        "expression": [f"the dog {'left ' * (row % 3)}".strip() for row in range(len(images))],
        "box": [[row, 2.0, row + 5.0, 12.0] for row in range(len(images))],
    }
    features = {"image": Image(), "image_id": Value("string"), "expression": Value("string")}
    return Dataset.from_dict(columns, Features({**features, "box": List(Value("float32"), length=4)}))


def test_image_groups_give_every_row_once_and_share_the_image():
    dataset = _dataset(["a", "bb", "a", "ccc", "bb", "a"])
    groups = ImageGroups(dataset)
    assert len(groups) == 3
    rows = groups.__getitems__([2, 0])
    assert [row["row_index"] for row in rows] == [3, 0, 2, 5]
    assert [row["box"][0] for row in rows] == [3, 0, 2, 5]
    assert rows[1]["image"] is rows[2]["image"] is rows[3]["image"]
    everything = groups.__getitems__(range(3))
    assert sorted(row["row_index"] for row in everything) == list(range(6))


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="lacks the column\\(s\\) expression; it has image, image_id, box"):
        ImageGroups(_dataset(["a"]).remove_columns("expression"))


def test_rows_of_one_image_share_one_visual_pass(processor):
    rows = ImageGroups(_dataset(["a", "bb", "a", "ccc", "bb", "a"])).__getitems__([0, 1, 2])
    random.Random(0).shuffle(rows)
    batch = EpmVGDataCollator(processor)(rows)
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and batch["input_ids"].shape[0] == 6
    # Every expression keeps its own box, text and image.
    ids = ["a", "bb", "a", "ccc", "bb", "a"]
    widths = batch["original_sizes"][batch["image_index"], 1].tolist()
    for position, row in enumerate(batch["row_index"].tolist()):
        assert batch["boxes"][position].tolist() == [row, 2, row + 5, 12]
        assert widths[position] == 40 + len(ids[row])
        assert int(batch["attention_mask"][position].sum()) == 4 + row % 3  # [CLS] the dog left* [SEP]
    boxes = processor.image_processor.letterbox(batch["original_sizes"][batch["image_index"]]).to_pixels(
        batch["labels"]
    )
    torch.testing.assert_close(boxes, batch["boxes"], atol=1e-3, rtol=0)


def test_at_most_so_many_expressions_of_an_image(processor):
    rows = ImageGroups(_dataset(["a"] * 9 + ["bb"] * 2)).__getitems__([0, 1])
    collator = EpmVGDataCollator(processor, max_expressions_per_image=4)
    random.seed(0)
    seen = set()
    for _ in range(20):
        batch = collator(rows)
        assert torch.bincount(batch["image_index"]).tolist() == [4, 2]
        seen.update(batch["row_index"].tolist())
    assert seen == set(range(11))


def test_rows_without_boxes_and_without_image(processor):
    rows = ImageGroups(_dataset(["a", "a"]).remove_columns("box")).__getitems__([0])
    assert "labels" not in EpmVGDataCollator(processor)(rows)
    with pytest.raises(ValueError, match="augmentation needs the boxes"):
        EpmVGDataCollator(processor, GroundingAugmentation())(rows)
    rows[0]["image"] = None
    with pytest.raises(ValueError, match="image 'a' is not there"):
        EpmVGDataCollator(processor)(rows)


def test_augmented_labels_lie_where_the_augmented_picture_shows_the_target(processor, tmp_path):
    """Scale, place, mirror and crop: the pixels under each label are still those of a coloured shape."""
    random.seed(0)
    dataset = load_grounding_dataset("shapes", split="train", num_images=6)
    augmentation = GroundingAugmentation(crop=1, color_jitter_probability=0)
    collator = EpmVGDataCollator(processor, augmentation)
    rows = ImageGroups(dataset).__getitems__(range(6))
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    places = set()
    for _ in range(5):
        batch = collator(rows)
        for label, image in zip(batch["labels"], batch["image_index"], strict=True):
            cx, cy, w, h = (label * 64).tolist()
            assert cx - w / 2 >= 0 and cx + w / 2 <= 64 and cy - h / 2 >= 0 and cy + h / 2 <= 64
            places.add(round(cx))
            middle = (batch["pixel_values"][image] * std + mean)[:, int(cy), int(cx)] * 255
            background = batch["pixel_mask"][image].bool()
            picture = (batch["pixel_values"][image] * std + mean)[:, background] * 255
            # Backgrounds are almost black or almost white; the centre of a shape is far from the picture's median.
            assert (middle - picture.median(dim=1).values).abs().max() > 40
    assert len(places) > 20
    assert np.ptp(batch["pixel_mask"].sum((1, 2)).numpy()) > 0


def test_captioned_images_take_turns_and_labelled_ones_come_once_an_epoch():
    labelled = ImageGroups(_dataset(["a", "b", "a", "c"]))
    captioned = ImageGroups(_dataset(["a", "x", "y", "y", "z"]).remove_columns("box"))
    mixed = CaptionedGroups(labelled, captioned, ratio=2 / 3, seed=0)
    assert len(mixed) == 3 + 2
    shown = []
    for epoch in range(4):
        mixed.set_epoch(epoch)
        rows = mixed.__getitems__([4, 0, 3, 2, 1])
        assert sorted(row["image_id"] for row in rows if row["box"] is not None) == ["a", "a", "b", "c"]
        without = [row for row in rows if row["box"] is None]
        # The same id in both sets means two images, and `group` counts on through both.
        assert all(row["image_id"] == ("captioned", captioned.rows[row["row_index"]]["image_id"]) for row in without)
        assert all(row["group"] - 3 == ["a", "x", "y", "z"].index(row["image_id"][1]) for row in without)
        shown += dict.fromkeys(row["image_id"][1] for row in without)
    # 4 epochs of 2 of 4 images: each twice, in turn.
    assert sorted(shown[:4]) == sorted(shown[4:]) == ["a", "x", "y", "z"]


def test_a_box_that_is_none_becomes_nan(processor):
    rows = ImageGroups(_dataset(["a", "bb", "a"])).__getitems__([0, 1])
    rows[1]["box"] = None
    for augmentation in (None, GroundingAugmentation(crop=1)):
        batch = EpmVGDataCollator(processor, augmentation)(rows)
        for name in ("labels", "boxes"):
            assert batch[name].isnan().all(-1).tolist() == [False, True, False], name
            assert not batch[name][[0, 2]].isnan().any()


def test_expressions_are_kept_as_augmented(processor):
    rows = ImageGroups(_dataset(["a", "a", "a"])).__getitems__([0])
    rows[1]["expression"] = "the dog left"
    batch = EpmVGDataCollator(processor, GroundingAugmentation(flip=1, crop=0), keep_expressions=True)(rows)
    assert batch["expressions"] == ["the dog", "the dog right", "the dog right right"]
