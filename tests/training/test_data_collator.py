import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value

from epmvg_hf import EpmVGDataCollator, GroundingAugmentation, ImageGroups, load_grounding_dataset
from epmvg_hf.data.captioned_groups import CaptionedGroups
from tests.fixtures.rows import coloured_rows


@pytest.mark.parametrize("streamed", [False, True])
def test_expressions_of_one_image_share_one_visual_pass(processor, streamed):
    dataset = coloured_rows(["a", "bb", "a", "ccc", "bb", "a"])
    if streamed:
        examples = [{**row, "row_index": index} for index, row in enumerate(dataset)]
    else:
        examples = list(map(ImageGroups(dataset).__getitem__, range(3)))
    random.Random(0).shuffle(examples)
    batch = EpmVGDataCollator(processor)(examples)
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


def test_an_image_that_is_drawn_twice_needs_one_visual_pass(processor):
    groups = ImageGroups(coloured_rows(["a", "bb", "a", "ccc"]))
    numbers = []
    collator = EpmVGDataCollator(processor, teacher_columns=lambda images, texts: numbers.extend(images) or {})
    batch = collator([groups[index] for index in (2, 0, 1, 0)])
    assert batch["pixel_values"].shape[0] == 3 and numbers == [2, 0, 1]  # in the order of their first appearance
    assert batch["row_index"].tolist() == [3, 0, 2, 0, 2, 1] == batch["boxes"][:, 0].tolist()
    assert batch["image_index"].tolist() == [0, 1, 1, 1, 1, 2]
    assert batch["original_sizes"][:, 1].tolist() == [43, 41, 42]
    # The limit counts the expressions of both draws.
    collator.max_expressions_per_image = 3
    assert torch.bincount(collator([groups[0], groups[1], groups[0]])["image_index"]).tolist() == [3, 1]


def test_a_captioned_image_is_another_than_the_labelled_one_of_the_same_id(processor):
    labelled = ImageGroups(coloured_rows(["a", "bb"]))
    captioned = ImageGroups(coloured_rows(["a"]).remove_columns("box"))
    mixed = CaptionedGroups(labelled, captioned, ratio=1.5, seed=0)  # the one captioned image comes three times
    batch = EpmVGDataCollator(processor)([mixed[index] for index in (0, 1, 2, 3, 4)])
    assert batch["image_index"].tolist() == [0, 1, 2, 2, 2]
    assert batch["labels"].isnan().all(-1).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("streamed", [False, True])
def test_absent_expressions_have_labels_of_zeros(processor, streamed):
    """Labels and boxes of the other rows are those of a dataset without the absent ones."""
    dataset = coloured_rows(["a", "bb", "a", "bb"])
    rows = dataset.add_column("absent", [False, True, True, False]).to_list()
    for row in rows:
        row["box"] = None if row["absent"] else row["box"]
    marked = Dataset.from_list(rows, features=Features({**dataset.features, "absent": Value("bool")}))

    def collate(dataset, **options):
        examples = [{**row, "row_index": index} for index, row in enumerate(dataset)]
        if not streamed:
            examples = list(map(ImageGroups(dataset).__getitem__, range(2)))
        return EpmVGDataCollator(processor, **options)(examples)

    batch, plain = collate(marked), collate(dataset)
    assert batch["row_index"].tolist() == [0, 2, 1, 3]
    assert batch["labels"][[1, 2]].tolist() == batch["boxes"][[1, 2]].tolist() == [[0.0] * 4] * 2
    assert torch.equal(batch["labels"][[0, 3]], plain["labels"][[0, 3]])
    if not streamed:
        augmented = collate(marked, augmentation=GroundingAugmentation(flip=1.0, crop=1.0, min_crop=0.5))
        assert augmented["labels"][[1, 2]].tolist() == augmented["boxes"][[1, 2]].tolist() == [[0.0] * 4] * 2
        assert (augmented["labels"][[0, 3], 2:] > 0).all()


def test_at_most_so_many_expressions_of_an_image(processor):
    groups = list(map(ImageGroups(coloured_rows(["a"] * 9 + ["bb"] * 2)).__getitem__, [0, 1]))
    collator = EpmVGDataCollator(processor, max_expressions_per_image=4)
    random.seed(0)
    seen = set()
    for _ in range(20):
        batch = collator(groups)
        assert torch.bincount(batch["image_index"]).tolist() == [4, 2]
        seen.update(batch["row_index"].tolist())
    assert seen == set(range(11))


def test_rows_without_boxes_and_without_image(processor):
    groups = list(map(ImageGroups(coloured_rows(["a", "a"]).remove_columns("box")).__getitem__, [0]))
    assert "labels" not in EpmVGDataCollator(processor)(groups)
    with pytest.raises(ValueError, match="augmentation needs the boxes"):
        EpmVGDataCollator(processor, GroundingAugmentation())(groups)
    groups[0].image = None
    with pytest.raises(ValueError, match="image 'a' is missing"):
        EpmVGDataCollator(processor)(groups)


def test_augmented_labels_lie_where_the_augmented_picture_shows_the_target(processor, tmp_path):
    """Scale, place, mirror and crop: the pixels under each label are still those of a coloured shape."""
    random.seed(0)
    dataset = load_grounding_dataset("shapes", split="train", num_images=6)
    augmentation = GroundingAugmentation(crop=1, color_jitter_probability=0)
    collator = EpmVGDataCollator(processor, augmentation)
    groups = list(map(ImageGroups(dataset).__getitem__, range(6)))
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    places = set()
    for _ in range(5):
        batch = collator(groups)
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


def test_a_box_that_is_none_becomes_nan(processor):
    groups = list(map(ImageGroups(coloured_rows(["a", "bb", "a"])).__getitem__, [0, 1]))
    groups[0].boxes[1] = np.nan
    for augmentation in (None, GroundingAugmentation(crop=1)):
        batch = EpmVGDataCollator(processor, augmentation)(groups)
        for name in ("labels", "boxes"):
            assert batch[name].isnan().all(-1).tolist() == [False, True, False], name
            assert not batch[name][[0, 2]].isnan().any()


def test_expressions_are_kept_as_augmented(processor):
    groups = list(map(ImageGroups(coloured_rows(["a", "a", "a"])).__getitem__, [0]))
    groups[0].expressions[1] = "the dog left"
    batch = EpmVGDataCollator(
        processor, GroundingAugmentation(flip=1, crop=0), teacher_columns=lambda images, texts: {"expressions": texts}
    )(groups)
    assert batch["expressions"] == ["the dog", "the dog right", "the dog right right"]
