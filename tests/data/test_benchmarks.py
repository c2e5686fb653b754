"""Tests of the names of the benchmarks, their splits and the folders of their images."""

import re
from pathlib import Path

import pytest

from epmvg_hf.data.benchmarks import ALIASES, BENCHMARKS, Counts, SplitRequest, resolve_name

NAMES = {
    "refcoco": ("refcoco", None),
    "RefCOCO": ("refcoco", None),
    "unc": ("refcoco", "unc"),
    "refcoco_unc": ("refcoco", "unc"),
    "refcoco-google": ("refcoco", "google"),
    "refcoco+": ("refcoco+", None),
    "RefCOCO +": ("refcoco+", None),
    "refcoco+_unc": ("refcoco+", "unc"),
    "refcocoplus": ("refcoco+", None),
    "refcoco_plus_unc": ("refcoco+", "unc"),
    "refcocop": ("refcoco+", None),
    "unc+": ("refcoco+", "unc"),
    "unc_plus": ("refcoco+", "unc"),
    "refcocog": ("refcocog", None),
    "RefCOCOg_UMD": ("refcocog", "umd"),
    "refcocog_google": ("refcocog", "google"),
    "gref": ("refcocog", "google"),
    "gref_google": ("refcocog", "google"),
    "gref_umd": ("refcocog", "umd"),
    "grefcoco": ("grefcoco", None),
    "gRefCOCO_unc": ("grefcoco", "unc"),
    "referitgame": ("referitgame", None),
    "ReferItGame": ("referitgame", None),
    "referit": ("referitgame", None),
    "referit_unc": ("referitgame", "unc"),
    "refclef": ("referitgame", None),
    "refclef_berkeley": ("referitgame", "berkeley"),
    "flickr30k_entities": ("flickr30k_entities", None),
    "Flickr30K Entities": ("flickr30k_entities", None),
    "flickr30k": ("flickr30k_entities", None),
    "flickr": ("flickr30k_entities", None),
}

# Published counts of expressions, references and images of all splits together, for splits that do not overlap.
TOTALS = [
    ("refcoco", "unc", ("train", "validation", "testA", "testB"), Counts(142_210, 50_000, 19_994)),
    ("refcoco+", "unc", ("train", "validation", "testA", "testB"), Counts(141_564, 49_856, 19_992)),
    ("refcocog", "umd", ("train", "validation", "test"), Counts(95_010, 49_822, 25_799)),
    ("referitgame", "standard", ("train", "validation"), Counts(59_976, 49_515, 9_995)),
    ("referitgame", "standard", ("trainval", "test"), Counts(120_081, 99_245, 19_989)),
]
COUNTED = [
    ("refcoco", "unc", "validation", Counts(10_834, 3_811, 1_500)),
    ("refcoco", "unc", "testA", Counts(5_657, 1_975, 750)),
    ("refcoco", "unc", "testB", Counts(5_095, 1_810, 750)),
    ("refcoco+", "unc", "validation", Counts(10_758, 3_805, 1_500)),
    ("refcoco+", "unc", "testA", Counts(5_726, 1_975, 750)),
    ("refcoco+", "unc", "testB", Counts(4_889, 1_798, 750)),
    ("refcocog", "umd", "validation", Counts(4_896, 2_573, 1_300)),
    ("refcocog", "umd", "test", Counts(9_602, 5_023, 2_600)),
    ("refcocog", "google", "train", Counts(85_474, 44_822, 24_698)),
    ("refcocog", "google", "validation", Counts(9_536, 5_000, 4_650)),
    ("referitgame", "standard", "validation", Counts(5_842, 4_866, 1_000)),
    ("referitgame", "standard", "test", Counts(60_105, 49_730, 9_994)),
    ("flickr30k_entities", "standard", "train", Counts(427_226, None, None)),
    ("flickr30k_entities", "standard", "validation", Counts(14_433, None, None)),
    ("flickr30k_entities", "standard", "test", Counts(14_481, None, 999)),
]


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    benchmark, split_by = resolve_name(name)
    assert (benchmark.name, split_by) == NAMES[name]


def test_every_alias_means_a_way_to_split_that_there_is():
    for name, (benchmark, split_by) in ALIASES.items():
        assert resolve_name(name) == (BENCHMARKS[benchmark], split_by)
        assert split_by in (None, *BENCHMARKS[benchmark].splits)


@pytest.mark.parametrize("name", ["refcoco3", "", "coco", "refcocog_unc", "refcoco+_google", "unc_google", "shapes"])
def test_unknown_names(name):
    names = "refcoco, refcoco+, refcocog, grefcoco, referitgame, flickr30k_entities, shapes and custom"
    with pytest.raises(ValueError, match=re.escape(f"name must be one of {names}, not {name!r}.")):
        resolve_name(name)


# Splits


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_every_split_can_be_requested(benchmark):
    first = next(iter(benchmark.splits))
    for split_by, splits in benchmark.splits.items():
        for split in splits:
            request = SplitRequest.resolve(benchmark, Path("x"), split, split_by)
            assert (request.split, request.split_by, request.boxes) == (split, split_by, "union")
        assert SplitRequest.resolve(benchmark, Path("x"), "val", split_by).split == "validation"
    assert SplitRequest.resolve(benchmark, Path("x"), "train").split_by == first
    assert set(benchmark.counts) <= {(way, split) for way, splits in benchmark.splits.items() for split in splits}
    assert set(benchmark.index_names) <= set(benchmark.splits)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "refcoco",
            {"split": "test"},
            "RefCOCO split by unc has the splits train, validation, testA, testB, not",
        ),
        ("refcoco", {"split": "testA", "split_by": "google"}, "by google has the splits train, validation, test, not"),
        ("refcoco+", {"split": "Train"}, "RefCOCO+ has the splits train, validation, testA, testB, not 'Train'."),
        ("refcoco+", {"split_by": "google"}, "RefCOCO+ can be split by unc, not by 'google'."),
        (
            "refcocog",
            {"split": "test", "split_by": "google"},
            "split by google has the splits train, validation, not",
        ),
        ("refcocog", {"split_by": "unc"}, "RefCOCOg can be split by umd, google, not by 'unc'."),
        ("referitgame", {"split_by": "x"}, "ReferItGame can be split by standard, unc, berkeley, not by 'x'."),
        ("flickr30k_entities", {"split": ""}, "Flickr30K Entities has the splits train, validation, test, not ''."),
        ("flickr30k_entities", {"boxes": "all"}, 'boxes must be "union" or "any", not \'all\'.'),
        ("refcocog", {"boxes": "any"}, 'boxes must be "union" for RefCOCOg, whose expressions have one box each.'),
    ],
)
def test_what_cannot_be_requested(name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SplitRequest.resolve(BENCHMARKS[name], Path("x"), **{"split": "train", **arguments})


# Counts


@pytest.mark.parametrize(("name", "split_by", "split", "counts"), COUNTED)
def test_counts(name, split_by, split, counts):
    assert BENCHMARKS[name].counts[split_by, split] == counts


@pytest.mark.parametrize(("name", "split_by", "splits", "total"), TOTALS)
def test_counts_add_up(name, split_by, splits, total):
    counts = [BENCHMARKS[name].counts[split_by, split] for split in splits]
    for field in ("expressions", "references", "images"):
        assert sum(getattr(count, field) for count in counts) == getattr(total, field)


# Images


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("refcoco", "images/mscoco/images/train2014"),
        ("refcoco+", "other/images/mscoco/images/train2014"),
        ("refcocog", "train2014"),
        ("grefcoco", "images/train2014"),
        ("referitgame", "images/saiapr_tc-12/07/images"),
        ("referitgame", "referit/images"),
        ("flickr30k_entities", "Flickr30k/flickr30k-images"),
    ],
)
def test_images_are_found_where_others_keep_them(tmp_path, name, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "7.jpg").touch()
    images = SplitRequest.resolve(BENCHMARKS[name], tmp_path, "train").images
    assert images.find("7.jpg") == str(tmp_path / folder / "7.jpg")
    assert str(tmp_path / folder) in images.describe()


def test_image_dir_is_the_only_place(tmp_path):
    for folder in ("train2014", "mine"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.jpg").touch()
    images = SplitRequest.resolve(BENCHMARKS["refcoco"], tmp_path, "train", image_dir=tmp_path / "mine").images
    assert images.find("mine.jpg") and images.find("train2014.jpg") is None
    assert images.describe() == str(tmp_path / "mine")


def test_the_first_of_several_places_counts(tmp_path):
    for number in ("00", "01"):
        (tmp_path / "saiapr_tc-12" / number / "images").mkdir(parents=True)
        (tmp_path / "saiapr_tc-12" / number / "images" / "7.jpg").touch()
    images = SplitRequest.resolve(BENCHMARKS["referitgame"], tmp_path, "train").images
    assert images.find("7.jpg") == str(tmp_path / "saiapr_tc-12" / "00" / "images" / "7.jpg")
