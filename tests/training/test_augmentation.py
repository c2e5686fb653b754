import random

import numpy as np
import pytest
import torch
from PIL import Image

from epmvg_hf.data.shapes import make_scene
from epmvg_hf.training.augmentation import GroundingAugmentation, mirror
from epmvg_hf.training.known_words import ENGLISH, KnownWords

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


def _draws(expression: str, count: int = 1000, **settings) -> list[tuple[Image.Image, str]]:
    """What a user's training sees of one expression in many draws."""
    random.seed(0)
    augmentation = GroundingAugmentation(**{"crop": 0, "color_jitter_probability": 0} | settings)
    image, box = _picture(), np.array([BOX], np.float32)
    return [
        (changed, texts[0]) for changed, texts, _ in (augmentation(image, [expression], box) for _ in range(count))
    ]


# The words that swap sides here, and all others, are none of the English ones; or nobody can tell what they mean.
@pytest.mark.parametrize(
    "expression",
    ["der Kreis links", "links", "rechts", "man links", "Die Hand rechts", "l'homme à gauche", "le chien", "perro",
     "izquierda", "左边的人", "左", "lewy pies", "chap", "r", "L", "table on the R", "l side", "rite side",
     "tight side", "boat let side", "2nd frm rt", "lft3", "righthandsided man", "rightunder tree", "leftdog",
     "dog 👈", "dog ←", "dog ->", "the # 7 player", "an L-shaped table", "the 's'", "the man at two oclock",
     "dog on the east", "coca cola can", "cafe\u0301 a\u0300 droite", "starboard boat", "der Kreis"],
)  # fmt: skip
def test_what_is_unknown_is_neither_mirrored_nor_cropped_nor_strongly_jittered(expression):
    for image, text in _draws(expression, 40, flip=1, crop=1):
        assert text == expression and image.tobytes() == _picture().tobytes()
    strong, weak = (
        _draws("the dog", 40, color_jitter_probability=1),
        _draws(expression, 40, color_jitter_probability=1),
    )
    assert _largest_change(weak) < _largest_change(strong) / 2


def _largest_change(draws: list[tuple[Image.Image, str]]) -> int:
    before = np.asarray(_picture()).astype(int)
    return max(np.abs(np.asarray(image) - before).max() for image, _ in draws if image.size == (160, 120))


@pytest.mark.parametrize("expression", ["der Kreis links", "rght circle", "sky top rigth", "bottom-lft"])
def test_no_side_is_wrong_in_a_thousand_draws(expression):
    """A picture is mirrored if and only if the word for the side changes with it."""
    for image, text in _draws(expression):
        assert (_red_box(image) != list(BOX)) == (text != expression)


@pytest.mark.parametrize(
    ("expression", "mirrored"),
    [
        ("rght circle", "left circle"),  # words of ReferItGame's annotators
        ("sky top rigth", "sky top left"),
        ("person far lef", "person far right"),
        ("Tree leftt", "Tree right"),
        ("btm lft corner", "btm rt corner"),
        ("bottom leftish", "bottom rightish"),
        ("topleft tower", "topright tower"),
        ("bottom_left tree", "bottom_right tree"),
        ("man on lefts arm", "man on rights arm"),
        ("RIGHTHAND cup, rightside plate", "LEFTHAND cup, leftside plate"),
    ],
)
def test_misspelled_and_abbreviated_sides_are_swapped(expression, mirrored):
    ((_, text),) = _draws(expression, 1, flip=1)
    assert text == mirrored


@pytest.mark.parametrize(
    "expression",
    [
        "first person",  # counted from a side that nobody names
        "the last horse",
        "the next glass",
        "second to last bus",
        "the driver's side door",
        "passenger side of the car",
        "rght above the car",
        "right  behind the car",
        "right close to the tree",
        "the cake that's left",
        "he left the room",
        "the last slice left",
        "a right angle",
    ],
)
def test_a_side_that_no_word_names_forbids_mirroring(expression):
    ((_, text),) = _draws(expression, 1, flip=1)
    assert text == expression


@pytest.mark.parametrize(
    "expression",
    ["second cup from the left", "the third car from right", "first row of seats", "last shelf at the bottom",
     "the first base", "Leftmost t-shirt", "the woman's hat, the man 's hat", "man w/ a black/white hat"],
)  # fmt: skip
def test_known_expressions_are_mirrored(expression):
    ((image, text),) = _draws(expression, 1, flip=1)
    assert _red_box(image) == [90, 20, 120, 60]
    assert (text != expression) == any(word in expression.lower() for word in ("left", "right"))


@pytest.mark.parametrize("split", ["train", "test_composition"])
def test_all_words_of_the_shapes_are_known(split):
    texts = {item.text for index in range(300) for item in make_scene(0, split, index).expressions}
    assert not ENGLISH.unknown(texts)
    assert all(map(ENGLISH.mirrorable, texts))


def test_words_of_another_language_are_a_setting():
    german = KnownWords({"links": "rechts", "linke": "rechte"}, {"der", "Kreis", "Hund"}, {"oben"}, {"rote"})
    settings = {"flip": 1, "words": german}
    assert _draws("Der linke Kreis", 1, **settings)[0][1] == "Der rechte Kreis"
    assert _draws("RECHTS der Hund", 1, **settings)[0][1] == "LINKS der Hund"
    assert _draws("the circle on the left", 1, **settings)[0][1] == "the circle on the left"
    for expression, cropped in [("Hund", True), ("rote Hund", True), ("Hund oben", False), ("Hund links", False)]:
        sizes = {image.size for image, _ in _draws(expression, 5, **settings, crop=1)}
        assert (sizes != {(160, 120)}) == cropped
    _, texts, _ = mirror(_picture(), ["der Kreis links"], np.array([BOX], np.float32), german)
    assert texts == ["der Kreis rechts"]


def test_an_unknown_word_of_one_expression_keeps_the_whole_picture_as_it_is():
    augmentation = GroundingAugmentation(flip=1, crop=1, color_jitter_probability=0)
    image, _, _ = augmentation(_picture(), ["a dog", "roter Kreis"], np.array([BOX, BOX], np.float32))
    assert image.tobytes() == _picture().tobytes()
