"""Tests of the embedded benchmark, with a checker that reads the expressions by a grammar of its own."""

import itertools
import math
import re
from collections import Counter, defaultdict
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image

from epmvg_hf.data import shapes
from epmvg_hf.data.shapes import Shapes, load_shapes, make_scene, render

NUM_IMAGES = {"train": 200, "validation": 100, "test": 100, "test_composition": 150}
HELD_OUT = {
    ("red", "triangle"),
    ("green", "star"),
    ("blue", "circle"),
    ("yellow", "cross"),
    ("purple", "square"),
    ("cyan", "diamond"),
}
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "gray")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")

# The checker: its grammar and its geometry are written from the documented meaning, not from the generator.

MARGIN = 4  # pixels between box centres below which a person could disagree
NOUN = rf"(?:small |large )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)}|object|shape|one)"
# Word -> (axis, sign): the objects further that way have the smaller `sign * centre[axis]`.
SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
EXTREMES = {
    **{"leftmost": "left", "rightmost": "right", "topmost": "top", "highest": "top"},
    **{"bottommost": "bottom", "lowest": "bottom"},
}
RELATIONS = {
    **{"left of": "left", "to the left of": "left", "right of": "right", "to the right of": "right"},
    **{"above": "top", "below": "bottom"},
}
RANKS = {"second": 1, "third": 2}
EXTREME = rf"({'|'.join(EXTREMES)}) ({NOUN})"
ORDINAL = rf"(second|third) ({NOUN}) from the (left|right|top|bottom)"
RELATION = rf"({NOUN}) ({'|'.join(RELATIONS)}|closest to) the ({NOUN})"


def center(item):
    left, top, right, bottom = item["box"]
    return (left + right) / 2, (top + bottom) / 2


def matching(noun, objects):
    words = set(noun.split()) - {"object", "shape", "one"}
    return [i for i, item in enumerate(objects) if words <= {item["size"], item["color"], item["shape"]}]


def ranked(candidates, side, objects):
    """The candidates in their order from that side, and their positions on the axis."""
    axis, sign = SIDES[side]
    places = sorted((sign * center(objects[i])[axis], i) for i in candidates)
    return [i for _, i in places], [place for place, _ in places]


def read(expression, objects):
    """
    Finds what an expression denotes by trying every object. Returns its kind and the objects it may denote: exactly
    one if all is well, none or several where a person could not tell or where the place adds nothing to the noun.
    """
    text = expression.removeprefix("the ")

    if re.fullmatch(NOUN, text):
        candidates = matching(text, objects)
        if not text.startswith(("small ", "large ")):
            return "attribute", candidates
        needed = len(matching(text.split(" ", 1)[1], objects)) > 1
        return "size", candidates if needed else []

    if match := re.fullmatch(EXTREME, text):
        kind, rank, side, noun = "extreme", 0, EXTREMES[match[1]], match[2]
    elif match := re.fullmatch(ORDINAL, text):
        kind, rank, side, noun = "ordinal", RANKS[match[1]], match[3], match[2]
    elif match := re.fullmatch(RELATION, text):
        return "relation", related(*match.groups(), objects)
    else:
        raise AssertionError(f"not in the grammar: {expression!r}")

    candidates = matching(noun, objects)
    if len(candidates) < 2 or rank >= len(candidates):
        return kind, []
    order, places = ranked(candidates, side, objects)
    return kind, [i for i, place in zip(order, places, strict=True) if abs(place - places[rank]) < MARGIN]


def related(subject, relation, reference, objects):
    references = matching(reference, objects)
    if len(references) != 1:
        return []
    anchor = center(objects[references[0]])
    candidates = [i for i in matching(subject, objects) if i != references[0]]
    if len(candidates) < 2:
        return []
    if relation == "closest to":
        distances = [math.dist(center(objects[i]), anchor) for i in candidates]
        return [i for i, d in zip(candidates, distances, strict=True) if d - min(distances) < MARGIN]
    axis, sign = SIDES[RELATIONS[relation]]
    # Objects on the border of the relation may be meant as well.
    return [i for i in candidates if sign * (center(objects[i])[axis] - anchor[axis]) < MARGIN]


def read_absent(expression, objects):
    """
    Finds the kind of an expression and the objects that it might be true of, with every benefit of the doubt: needless
    or unclear words do not count against an object, nor does a reference that could be one of several.
    """
    text = expression.removeprefix("the ")
    if re.fullmatch(NOUN, text):
        return "size" if text.startswith(("small ", "large ")) else "attribute", matching(text, objects)
    if match := re.fullmatch(EXTREME, text):
        return "extreme", matching(match[2], objects)
    if match := re.fullmatch(ORDINAL, text):
        candidates = matching(match[2], objects)
        return "ordinal", candidates if len(candidates) > RANKS[match[1]] else []
    match = re.fullmatch(RELATION, text)
    assert match, f"not in the grammar: {expression!r}"
    subject, relation, reference = match.groups()
    pairs = [(i, j) for i in matching(subject, objects) for j in matching(reference, objects) if i != j]
    if relation == "closest to":
        return "relation", [i for i, _ in pairs]
    axis, sign = SIDES[RELATIONS[relation]]
    offsets = [(i, sign * (center(objects[i])[axis] - center(objects[j])[axis])) for i, j in pairs]
    return "relation", [i for i, offset in offsets if offset < MARGIN]


def complaints(row):
    kind, denoted = read(row["expression"], row["objects"])
    found = []
    if kind != row["kind"]:
        found.append(f"{row['expression']!r} is of kind {kind}, not {row['kind']}")
    if len(denoted) != 1:
        found.append(f"{row['expression']!r} denotes {len(denoted)} objects")
    elif list(row["objects"][denoted[0]]["box"]) != list(row["box"]):
        found.append(f"{row['expression']!r} denotes another object")
    return found


def example(expression, kind, target):
    objects = [
        {"shape": "circle", "color": "red", "size": "small", "box": [10, 50, 26, 66]},
        {"shape": "circle", "color": "red", "size": "large", "box": [60, 45, 90, 75]},
        {"shape": "circle", "color": "blue", "size": "small", "box": [100, 10, 116, 26]},
        {"shape": "star", "color": "green", "size": "small", "box": [102, 90, 118, 106]},
    ]
    return {"expression": expression, "kind": kind, "box": objects[target]["box"], "objects": objects}


@pytest.mark.parametrize(
    ("expression", "kind", "target"),
    [
        ("blue circle", "attribute", 2),
        ("the green one", "attribute", 3),
        ("the large red circle", "size", 1),
        ("the leftmost object", "extreme", 0),
        ("the lowest shape", "extreme", 3),
        ("the second circle from the left", "ordinal", 1),
        ("third circle from the left", "ordinal", 2),
        ("the circle to the left of the large object", "relation", 0),
        ("the circle right of the large circle", "relation", 2),
        ("the red circle closest to the star", "relation", 1),
    ],
)
def test_checker_accepts_what_is_true(expression, kind, target):
    assert complaints(example(expression, kind, target)) == []
    for other in {0, 1, 2, 3} - {target}:
        assert complaints(example(expression, kind, other)), "a swapped box goes unnoticed"
    assert complaints(example(expression, "another kind", target))


@pytest.mark.parametrize(
    ("expression", "kind", "target"),
    [
        ("the red circle", "attribute", 0),  # two of them
        ("the purple circle", "attribute", 0),  # none
        ("the small circle", "size", 0),  # two of them
        ("the small star", "size", 3),  # the only star needs no size
        ("the highest red circle", "extreme", 0),  # level with the other one
        ("the rightmost object", "extreme", 3),  # leads by two pixels
        ("the leftmost star", "extreme", 3),  # the only star needs no place
        ("the second circle from the top", "ordinal", 1),  # level with another one
        ("the third red circle from the left", "ordinal", 1),  # there are two
        ("the circle left of the star", "relation", 0),  # two are, a third nearly is
        ("the circle above the large circle", "relation", 2),  # another one is two pixels above
        ("the circle left of the red circle", "relation", 0),  # which red circle?
        ("the blue circle above the star", "relation", 2),  # the only blue circle needs no relation
    ],
)
def test_checker_rejects_what_is_unclear(expression, kind, target):
    assert complaints(example(expression, kind, target))


@pytest.mark.parametrize(
    ("expression", "kind", "possible"),
    [
        ("the purple circle", "attribute", []),
        ("the red one", "attribute", [0, 1]),
        ("the large star", "size", []),
        ("the small star", "size", [3]),  # "small" is not needed, but true
        ("the leftmost green circle", "extreme", []),
        ("the leftmost star", "extreme", [3]),
        ("the third red circle from the left", "ordinal", []),
        ("the second red circle from the top", "ordinal", [0, 1]),
        ("the star above the blue circle", "relation", []),
        ("the star left of the blue circle", "relation", [3]),  # two pixels to the right of it
        ("the red circle right of the blue circle", "relation", []),
        ("the circle left of the red circle", "relation", [0]),  # of one of the red circles
        ("the star closest to the cross", "relation", []),
        ("the star closest to the large circle", "relation", [3]),
    ],
)
def test_checker_of_absent_expressions(expression, kind, possible):
    objects = example(expression, kind, 0)["objects"]
    found, candidates = read_absent(expression, objects)
    assert found == kind and sorted(set(candidates)) == possible


@pytest.mark.parametrize("expression", ["the red", "circle red", "the leftmost", "first star from the left"])
def test_checker_rejects_what_it_cannot_read(expression):
    with pytest.raises(AssertionError, match="not in the grammar"):
        complaints(example(expression, "attribute", 0))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def splits(cache_dir):
    return {split: load_shapes(split, num_images=count, cache_dir=cache_dir) for split, count in NUM_IMAGES.items()}


@pytest.fixture(scope="module")
def rows(splits):
    """The rows of each split without their pictures."""
    return {split: dataset.remove_columns("image").to_list() for split, dataset in splits.items()}


def encoded(dataset):
    """The rows with the pictures as PNG bytes."""
    return dataset.cast_column("image", datasets.Image(decode=False)).to_list()


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_every_expression_denotes_exactly_its_box(rows, split):
    assert [complaint for row in rows[split] for complaint in complaints(row)] == []


def test_several_thousand_expressions_are_checked(rows):
    assert sum(map(len, rows.values())) > 4_000


@pytest.mark.parametrize(("split", "least"), [("train", 0.12), ("validation", 0.12), ("test", 0.12)])
def test_every_kind_has_a_decent_share(rows, split, least):
    counts = Counter(row["kind"] for row in rows[split])
    assert set(counts) == set(shapes.KINDS)
    assert min(counts.values()) >= least * len(rows[split])


def test_every_kind_occurs_in_test_composition(rows):
    counts = Counter(row["kind"] for row in rows["test_composition"])
    assert set(counts) == set(shapes.KINDS)
    assert min(counts.values()) >= 0.08 * len(rows["test_composition"])


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_rows_of_an_image_are_consecutive_and_distinct(rows, split):
    images = [(image_id, list(group)) for image_id, group in itertools.groupby(rows[split], lambda r: r["image_id"])]
    assert [image_id for image_id, _ in images] == [f"0-{split}-{i:06d}" for i in range(NUM_IMAGES[split])]
    for _, group in images:
        expressions = [row["expression"].removeprefix("the ") for row in group]
        assert 1 <= len(expressions) == len(set(expressions)) <= 8
        assert all(row["objects"] == group[0]["objects"] for row in group)


def test_expressions_spread_over_the_objects(rows):
    named, present = 0, 0
    for _, group in itertools.groupby(rows["train"], lambda row: row["image_id"]):
        group = list(group)
        named += len({tuple(row["box"]) for row in group})
        present += len(group[0]["objects"])
    assert named >= 0.95 * present


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_held_out_pairs_are_absent(rows, split):
    seen = {(item["color"], item["shape"]) for row in rows[split] for item in row["objects"]}
    assert not seen & HELD_OUT


def test_training_shows_every_other_pair(rows):
    seen = {(item["color"], item["shape"]) for row in rows["train"] for item in row["objects"]}
    assert seen == set(itertools.product(COLORS, SHAPES)) - HELD_OUT


def test_test_composition_is_about_held_out_pairs(rows):
    targets = set()
    for row in rows["test_composition"]:
        (target,) = [item for item in row["objects"] if item["box"] == row["box"]]
        assert (target["color"], target["shape"]) in HELD_OUT
        assert f"{target['color']} {target['shape']}" in row["expression"]
        targets.add((target["color"], target["shape"]))
    assert targets == HELD_OUT


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_scenes_keep_their_promises(rows, split):
    widths = defaultdict(set)
    for row in rows[split]:
        assert 3 <= len(row["objects"]) <= 7
        for item in row["objects"]:
            widths[item["size"]].add(item["box"][2] - item["box"][0])
        for a, b in itertools.combinations([item["box"] for item in row["objects"]], 2):
            assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= 2, "boxes touch"
    assert max(widths["small"]) + 6 <= min(widths["large"])


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_boxes_are_tight_around_the_drawn_pixels(split):
    shapes_of_canvas = set()
    for index in range(40):
        scene = make_scene(3, split, index)
        background = np.asarray(render(replace(scene, objects=())), dtype=int)
        shapes_of_canvas.add(background.shape)
        changed_together = np.zeros(background.shape[:2], dtype=bool)
        for item in scene.objects:
            alone = np.asarray(render(replace(scene, objects=(item,))), dtype=int)
            change = np.abs(alone - background).max(axis=-1)
            rows_changed, columns_changed = np.nonzero(change)
            left, top = columns_changed.min(), rows_changed.min()
            assert item.box == (left, top, columns_changed.max() + 1, rows_changed.max() + 1)
            assert change.max() >= 80, "an object hardly differs from its background"
            changed_together |= change > 0
        together = np.asarray(render(scene), dtype=int)
        assert (np.any(together != background, axis=-1) == changed_together).all(), "objects hide one another"
    assert all(max(height, width) == 128 and min(height, width) >= 96 for height, width, _ in shapes_of_canvas)
    assert len(shapes_of_canvas) > 10


def test_object_colors_are_far_apart():
    for a, b in itertools.combinations(shapes.COLORS.values(), 2):
        assert math.dist(a, b) > 80


def test_rows_hold_the_rendered_picture_and_the_documented_types(splits):
    for dataset in splits.values():
        row = dataset[0]
        _, split, index = row["image_id"].split("-")
        assert isinstance(row["image"], Image.Image)
        expected = render(make_scene(0, split, int(index)))
        assert row["image"].mode == "RGB"
        assert row["image"].tobytes() == expected.tobytes()
        assert dataset.features["box"] == datasets.List(datasets.Value("float32"), length=4)
        assert dataset.split == split


ABSENT = 3


@pytest.fixture(scope="module")
def splits_with_absent(cache_dir):
    return {
        split: load_shapes(split, num_images=count, cache_dir=cache_dir, absent_per_image=ABSENT)
        for split, count in NUM_IMAGES.items()
    }


@pytest.fixture(scope="module")
def absent_rows(splits_with_absent):
    """The rows of each split that describe nothing, without their pictures."""
    without_images = {split: dataset.remove_columns("image") for split, dataset in splits_with_absent.items()}
    return {split: [row for row in dataset if row["absent"]] for split, dataset in without_images.items()}


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_absent_expressions_come_after_the_unchanged_rows_of_each_image(split, splits, splits_with_absent):
    dataset = splits_with_absent[split]
    present = dataset.filter(lambda absent: not absent, input_columns="absent").remove_columns("absent")
    assert present.features == splits[split].features
    assert encoded(present) == encoded(splits[split])
    for _, group in itertools.groupby(dataset.remove_columns("image"), lambda row: row["image_id"]):
        group = list(group)
        assert [row["absent"] for row in group] == [False] * (len(group) - ABSENT) + [True] * ABSENT
        assert all((row["box"] is None) == row["absent"] for row in group)
        assert all(row["objects"] == group[0]["objects"] for row in group)
        assert len({row["expression"].removeprefix("the ") for row in group}) == len(group)


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_no_absent_expression_might_be_true_of_any_object(split, absent_rows):
    assert len(absent_rows[split]) == ABSENT * NUM_IMAGES[split]
    for row in absent_rows[split]:
        assert read_absent(row["expression"], row["objects"]) == (row["kind"], []), row


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_absent_expressions_are_of_all_kinds_and_about_half_are_near_misses(split, absent_rows):
    counts = Counter(row["kind"] for row in absent_rows[split])
    assert set(counts) == set(shapes.KINDS) and min(counts.values()) >= 0.12 * len(absent_rows[split])
    near = []
    for row in absent_rows[split]:
        noun = re.search(NOUN, row["expression"])[0].split()
        words = set(noun) & {*COLORS, *SHAPES}
        seen = {word for item in row["objects"] for word in (item["color"], item["shape"])}
        near.append(not words or bool(words & seen))
    # Few pairs are held out, so a scene of test_composition often has none that comes near to one of its objects.
    assert (0.1 if split == "test_composition" else 0.35) <= np.mean(near) <= 0.65


@pytest.mark.parametrize("split", NUM_IMAGES)
def test_absent_expressions_keep_to_the_pairs_of_their_split(split, absent_rows):
    for row in absent_rows[split]:
        first_noun, *others = re.findall(NOUN, row["expression"].removeprefix("the "))
        pairs = [tuple(noun.split()[-2:]) for noun in (first_noun, *others)]
        if split == "test_composition":
            assert pairs[0] in HELD_OUT
        else:
            assert not HELD_OUT & set(pairs)


def test_absent_expressions_are_the_same_each_time(splits_with_absent, tmp_path):
    again = load_shapes("train", num_images=60, num_proc=2, cache_dir=str(tmp_path), absent_per_image=ABSENT)
    streamed = load_shapes("train", num_images=60, streaming=True, absent_per_image=ABSENT, cache_dir=str(tmp_path))
    expected = encoded(splits_with_absent["train"])[: len(again)]
    assert encoded(again) == expected
    assert list(streamed.cast_column("image", datasets.Image(decode=False))) == expected
    texts = [item.text for item in make_scene(0, "train", 0, num_absent=1).expressions]
    assert texts == [item.text for item in make_scene(0, "train", 0, num_absent=3).expressions][:-2]
    assert texts[-1] != make_scene(1, "train", 0, num_absent=1).expressions[-1].text


def test_every_scene_has_enough_absent_expressions():
    for split in NUM_IMAGES:
        for index in range(60):
            scene = make_scene(7, split, index, num_absent=8)
            absent = [item for item in scene.expressions if item.target is None]
            assert len(absent) == len({item.text.removeprefix("the ") for item in absent}) == 8


def test_same_rows_with_any_number_of_processes_and_images(splits, tmp_path):
    expected = encoded(splits["train"])
    shorter = encoded(load_shapes("train", num_images=120, num_proc=2, cache_dir=str(tmp_path)))
    assert {row["image_id"] for row in shorter} == {f"0-train-{i:06d}" for i in range(120)}
    assert shorter == expected[: len(shorter)]


def test_streaming_gives_the_same_rows(splits, cache_dir):
    stream = load_shapes("validation", num_images=60, streaming=True, cache_dir=cache_dir)
    assert isinstance(stream, datasets.IterableDataset)
    assert stream.num_shards == 2
    streamed = list(stream.cast_column("image", datasets.Image(decode=False)))
    assert streamed == encoded(splits["validation"])[: len(streamed)]
    assert streamed[-1]["image_id"] == "0-validation-000059"
    assert isinstance(next(iter(stream))["image"], Image.Image)


def test_seeds_and_splits_are_unrelated(splits, cache_dir):
    other = load_shapes("validation", seed=1, num_images=100, cache_dir=cache_dir)
    assert other[0]["image_id"] == "1-validation-000000"
    pictures = {row["image"]["bytes"] for row in encoded(other)}
    assert len(pictures) == 100
    for dataset in splits.values():
        assert not pictures & {row["image"]["bytes"] for row in encoded(dataset)}
    assert render(make_scene(0, "train", 0)).tobytes() != render(make_scene(0, "test", 0)).tobytes()


def test_the_cache_is_keyed_by_what_is_drawn(tmp_path):
    def folder(**kwargs):
        return Shapes(dataset_name="shapes", cache_dir=str(tmp_path), **kwargs).cache_dir

    assert folder(split="test") == folder(split="test", seed=0, num_images=1_000)
    assert folder(split="test") == folder(split="test", absent_per_image=None)
    folders = {folder(split="test"), folder(split="train"), folder(split="test", seed=1), folder(num_images=7)}
    folders |= {folder(split="test", absent_per_image=1), folder(split="test", absent_per_image=2)}
    assert len(folders) == 6
    assert all(shapes.GENERATOR_VERSION in path for path in folders)


@pytest.mark.parametrize(
    ("split", "count"), [("train", 12_000), ("validation", 500), ("test", 1_000), ("test_composition", 500)]
)
def test_default_number_of_images(split, count, tmp_path):
    assert Shapes(cache_dir=str(tmp_path), split=split).config.num_images == count


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "val"}, "Unknown split 'val' of shapes: choose one of train, validation, test, test_composition."),
        ({"split": "test", "num_images": 0}, "`num_images` must be a positive integer, got 0."),
        ({"split": "test", "num_images": 2.5}, "`num_images` must be a positive integer, got 2.5."),
        ({"split": "test", "seed": -1}, "`seed` must be a non-negative integer, got -1."),
        ({"split": "test", "absent_per_image": 0}, "`absent_per_image` must be an integer from 1 to 8, got 0."),
        ({"split": "test", "absent_per_image": 9}, "`absent_per_image` must be an integer from 1 to 8, got 9."),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_errors_are_clear(kwargs, message, streaming, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_shapes(**kwargs, streaming=streaming, cache_dir=str(tmp_path))
