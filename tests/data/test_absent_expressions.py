"""Tests of expressions that are known to name nothing in an image."""

import re
from collections import Counter

import pytest
from datasets import Dataset, Image, Value

from epmvg_hf import ImageGroups
from epmvg_hf.data.absent_expressions import add_absent_expressions, head_noun
from tests.fixtures.rows import coloured_rows

# The expressions of each image, and the sentence that some of them are from.
PHOTOS = {
    "a": [("a man in a red shirt", "A man in a red shirt pets two dogs ."), ("two dogs", "A man pets two dogs .")],
    "bb": [("The women", "The women drive a bus past a tree ."), ("a bus", "The women drive a bus .")],
    "ccc": [("red", "Something red ."), ("three foxes on a hill", "Three foxes sit on a hill .")],
    "dddd": [("a tiny fox", None), ("the trees behind the lake", "A worker looks at the trees behind the lake .")],
    "eeeee": [("the other one", "One and the other one ."), ("strollers", "Strollers .")],
}
# Whoever reads the words may say which of them mean the same thing.
SAME = {"dogs": "dog", "foxes": "fox", "trees": "tree", "strollers": "stroller", "buses": "bus"}
SAME |= dict.fromkeys(("man", "women", "worker", "one"), "person")
HEADS = {
    **{
        "a man in a red shirt": "person",
        "two dogs": "dog",
        "The women": "person",
        "a bus": "bus",
        "a tiny fox": "fox",
    },
    **{"three foxes on a hill": "fox", "the trees behind the lake": "tree", "strollers": "stroller"},
}


def photos(sentences: bool = True) -> Dataset:
    images = [image_id for image_id, rows in PHOTOS.items() for _ in rows]
    columns = list(zip(*(row for rows in PHOTOS.values() for row in rows), strict=True))
    dataset = coloured_rows(images).remove_columns("expression").add_column("expression", columns[0])
    return dataset.add_column("sentence", columns[1]) if sentences else dataset


def mentioned(image_id: str, sentences: bool) -> set[str]:
    texts = [text for row in PHOTOS[image_id] for text in (row if sentences else row[:1]) if text]
    return {SAME.get(word, word) for text in texts for word in re.findall("[a-z]+", text.lower())}


def could_be_absent(image_id: str, sentences: bool) -> set[str]:
    return {text for text, head in HEADS.items() if head not in mentioned(image_id, sentences)}


@pytest.mark.parametrize("sentences", [True, False])
def test_nothing_absent_is_mentioned_and_all_that_may_be_absent_is_drawn(sentences):
    drawn = {image_id: set() for image_id in PHOTOS}
    for seed in range(40):
        for row in add_absent_expressions(photos(sentences), per_image=2, seed=seed):
            if row["absent"]:
                drawn[row["image_id"]].add(row["expression"])
    assert drawn == {image_id: could_be_absent(image_id, sentences) for image_id in PHOTOS}
    # Sentences say more than the expressions: a worker beside the trees, and a tree beside the bus.
    assert ("The women" in drawn["dddd"]) != sentences
    assert ("the trees behind the lake" in drawn["bb"]) != sentences


def test_people_are_not_absent_where_there_are_other_people():
    for seed in range(20):
        dataset = add_absent_expressions(photos(), per_image=3, seed=seed)
        found = {
            row["expression"] for row in dataset if row["absent"] and row["image_id"] in ("a", "bb", "dddd", "eeeee")
        }
        assert not found & {"a man in a red shirt", "The women"}


def test_columns_and_the_rows_that_there_were():
    dataset = photos().add_column("chain_id", list(range(10)))
    result = add_absent_expressions(dataset, per_image=2)
    assert result.features == {**dataset.features, "absent": Value("bool")}
    present, absent = result.select(range(10)), result.select(range(10, len(result)))
    assert present["absent"][:] == [False] * 10 and list(present.remove_columns("absent")) == list(dataset)
    assert Counter(absent["image_id"][:]) == dict.fromkeys(PHOTOS, 2)
    stored = dict(zip(dataset["image_id"], dataset.cast_column("image", Image(decode=False))["image"], strict=True))
    for row in absent.cast_column("image", Image(decode=False)):
        image_id, expression = row["image_id"], row["expression"]
        assert row == {
            **{"image": stored[image_id], "image_id": image_id, "expression": expression, "box": None},
            **{"sentence": None, "chain_id": None, "absent": True},
        }
    assert len({(row["image_id"], row["expression"]) for row in absent}) == len(absent)


def test_a_seed_decides_what_is_drawn():
    def drawn(seed: int) -> list[str]:
        return add_absent_expressions(photos(), per_image=1, seed=seed)["expression"][:]

    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_images_get_fewer_where_there_is_no_more():
    result = add_absent_expressions(photos(), per_image=50)
    counts = Counter(row["image_id"] for row in result if row["absent"])
    assert counts == {image_id: len(could_be_absent(image_id, sentences=True)) for image_id in PHOTOS}
    alone = photos().select([0, 1])
    assert add_absent_expressions(alone, per_image=3)["absent"][:] == [False, False]


def test_the_rows_are_those_that_models_train_on():
    groups = ImageGroups(add_absent_expressions(photos(), per_image=2))
    groups.check_rows("train_dataset", needs_boxes=True)
    assert len(groups) == len(PHOTOS)  # the images of the new rows are the same
    assert all((group.boxes == 0).all(axis=1).tolist() == [False, False, True, True] for group in groups)


def test_a_dataset_that_has_absent_expressions_keeps_them():
    once = add_absent_expressions(photos(), per_image=1)
    twice = add_absent_expressions(once, per_image=2)
    assert list(twice.select(range(len(once)))) == list(once)
    new = twice.select(range(len(once), len(twice)))
    assert len(new) >= len(PHOTOS) and all(new["absent"])
    known = {(row["image_id"], row["expression"]) for row in once}
    assert not known & {(row["image_id"], row["expression"]) for row in new}


def test_images_without_ids_are_told_apart():
    with_ids, without = photos(), photos().remove_columns("image_id")
    one, other = (add_absent_expressions(dataset, per_image=2) for dataset in (with_ids, without))
    assert list(one.remove_columns("image_id")) == list(other)


@pytest.mark.parametrize("per_image", [0, -1])
def test_a_number_that_is_not_positive_is_an_error(per_image):
    with pytest.raises(ValueError, match=f"^per_image must be at least 1, got {per_image}$"):
        add_absent_expressions(photos(), per_image=per_image)


def test_a_dataset_without_boxes_is_an_error():
    with pytest.raises(ValueError, match=r"^absent expressions need a dataset with boxes, and this one has no column"):
        add_absent_expressions(photos().remove_columns("box"), per_image=1)


@pytest.mark.parametrize(
    ("expression", "noun"),
    [
        ("Two young men in hats", "man"),
        ("the left corner of a red car", "corner"),
        ("sunglasses", "sunglass"),
        ("a city", "city"),
        ("three puppies", "puppy"),
        ("green bushes behind the house", "bush"),
        ("boxes", "box"),
        ("the grass", "grass"),
        ("a bus", "bus"),
        ("children", "child"),
        ("in", "in"),
        ("a dog's ear", "ear"),
        ("the man who is wearing a hat", "man"),
        ("12 !", ""),
    ],
)
def test_head_noun(expression, noun):
    assert head_noun(expression) == noun
