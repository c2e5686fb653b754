import random

import numpy as np
import pytest
import torch
from PIL import Image

from epmvg_hf.training.augmentation import GroundingAugmentation, mirror

BOX = (40, 20, 70, 60)


def _picture(box=BOX, size=(160, 120)) -> Image.Image:
    """Gray, with a red rectangle at the box and a blue one in the left upper corner."""
    image = Image.new("RGB", size, (120, 120, 120))
    image.paste((255, 0, 0), box)
    image.paste((0, 0, 255), (0, 0, 10, 10))
    return image


def _red_box(image: Image.Image) -> list[int]:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = np.nonzero((pixels[..., 0] > 150) & (pixels[..., 1] < 90))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize(
    ("expression", "mirrored"),
    [
        ("man on the left", "man on the right"),
        ("Right bright laptop", "Left bright laptop"),
        ("LEFT-most cup, rightmost plate", "RIGHT-most cup, leftmost plate"),
        ("upright copyright cleft", "upright copyright cleft"),
        ("girl on rt, lft guy, leftest man", "girl on lft, rt guy, rightest man"),
        ("the rightmost dog left of the left door", "the leftmost dog right of the right door"),
    ],
)
def test_mirror_swaps_words_not_substrings(expression, mirrored):
    image, expressions, boxes = mirror(_picture(), [expression], np.array([BOX], np.float32))
    assert expressions == [mirrored]
    assert boxes.tolist() == [[90, 20, 120, 60]]
    assert _red_box(image) == [90, 20, 120, 60]
    back = mirror(image, expressions, boxes)
    assert back[1] == [expression] and back[2].tolist() == [list(BOX)]


@pytest.mark.parametrize(
    "expression",
    [
        "the cat right behind the man",
        "right next to the door",
        "slice left over",
        "player number 7",
        "sign that says go",
        "man right across the street",
        "the slice that is left",
        "the one labeled go",
        "the lefty",
    ],
)
def test_what_cannot_be_mirrored_is_not(expression):
    augmentation = GroundingAugmentation(flip=1, crop=0, color_jitter_probability=0)
    _, expressions, boxes = augmentation(_picture(), [expression, "a dog"], np.array([BOX, BOX], np.float32))
    assert expressions == [expression, "a dog"]
    assert boxes.tolist() == [list(BOX)] * 2


@pytest.mark.parametrize("expression", ["man on right in blue", "the right by the door", "the far right over there"])
def test_a_direction_before_a_preposition_is_still_mirrored(expression):
    augmentation = GroundingAugmentation(flip=1, crop=0, color_jitter_probability=0)
    _, expressions, _ = augmentation(_picture(), [expression], np.array([BOX], np.float32))
    assert expressions == [expression.replace("right", "left")]


def test_crop_never_cuts_a_target():
    random.seed(0)
    augmentation = GroundingAugmentation(flip=0.5, crop=1, color_jitter_probability=0)
    boxes = np.array([BOX, (100, 90, 150, 118)], np.float32)
    sizes = set()
    for _ in range(200):
        image, _, changed = augmentation(_picture(), ["a red thing", "a thing"], boxes)
        assert (changed[:, :2] >= 0).all() and (changed[:, 2] <= image.width).all()
        assert (changed[:, 3] <= image.height).all()
        assert (changed[:, 2:] - changed[:, :2]).tolist() == (boxes[:, 2:] - boxes[:, :2]).tolist()
        assert _red_box(image) == changed[0].tolist()
        assert image.width >= 0.6 * 160 and image.height >= 0.6 * 120
        sizes.add(image.size)
    assert len(sizes) > 50


def test_crop_keeps_fractional_boxes_and_boxes_at_the_border():
    random.seed(0)
    augmentation = GroundingAugmentation(flip=0, crop=1, color_jitter_probability=0)
    box = np.array([[0.0, 3.4, 12.6, 120.0]], np.float32)
    for _ in range(100):
        image, _, changed = augmentation(_picture(), ["thing"], box)
        assert (changed >= 0).all() and changed[0, 2] <= image.width and changed[0, 3] <= image.height


@pytest.mark.parametrize(
    "expression",
    ["leftmost man", "the second cup from the left", "dog next to the door", "man in the middle", "the 3rd cup",
     "the top shelf", "the red square above the blue circle", "person closest to the camera",
     "mid guy", "btm cup", "leftest man", "girl on rt", "the 10th runner", "person facing the dog", "half a pizza"],
)  # fmt: skip
def test_expressions_about_places_are_not_cropped(expression):
    random.seed(0)
    augmentation = GroundingAugmentation(flip=0, crop=1, color_jitter_probability=0)
    for _ in range(5):
        image, _, boxes = augmentation(_picture(), ["a dog", expression], np.array([BOX, BOX], np.float32))
        assert image.size == (160, 120) and boxes.tolist() == [list(BOX)] * 2


@pytest.mark.parametrize("expression", ["man with a laptop", "the stopwatch", "a bright frontier"])
def test_words_that_only_contain_place_words_are_cropped(expression):
    random.seed(0)
    augmentation = GroundingAugmentation(flip=0, crop=1, color_jitter_probability=0)
    sizes = {augmentation(_picture(), [expression], np.array([BOX], np.float32))[0].size for _ in range(5)}
    assert sizes != {(160, 120)}


def test_a_named_colour_survives_the_jitter():
    random.seed(0)
    augmentation = GroundingAugmentation(flip=0, crop=0, color_jitter_probability=1)

    def largest_change(expression: str) -> int:
        changes = []
        for _ in range(40):
            image, _, _ = augmentation(_picture(), [expression], np.array([BOX], np.float32))
            changes.append(np.abs(np.asarray(image).astype(int) - np.asarray(_picture())).max())
        return max(changes)

    assert largest_change("the gray dog") < largest_change("the dog") / 2


def test_placement_stays_on_the_canvas():
    random.seed(0)
    placements = [GroundingAugmentation().placement(640) for _ in range(500)]
    long_sides, tops, lefts = map(np.array, zip(*placements, strict=True))
    assert long_sides.min() >= 448 and long_sides.max() <= 640 and len(set(long_sides.tolist())) > 100
    assert tops.min() >= 0 and tops.max() <= 1 and lefts.min() >= 0 and lefts.max() <= 1


def test_draws_depend_on_the_random_state_alone():
    def draw():
        random.seed(3)
        torch.manual_seed(3)  # colour jitter
        return GroundingAugmentation()(_picture(), ["a man"], np.array([BOX], np.float32))

    first, second = draw(), draw()
    assert first[0].tobytes() == second[0].tobytes() and first[2].tolist() == second[2].tolist()


def test_expressions_without_a_box_stay_so_and_are_not_cropped_away():
    random.seed(0)
    augmentation = GroundingAugmentation(flip=0.5, crop=1, color_jitter_probability=0)
    boxes = np.array([[np.nan] * 4, BOX], np.float32)
    mirrored = 0
    for _ in range(20):
        image, expressions, changed = augmentation(_picture(), ["a thing to the left", "a red thing"], boxes)
        assert image.size == (160, 120) and np.isnan(changed[0]).all() and changed.dtype == np.float32
        assert _red_box(image) == changed[1].tolist()
        mirrored += expressions[0] == "a thing to the right"
    assert 0 < mirrored < 20
    assert boxes[1].tolist() == list(BOX)
