"""Tests of the index files: hand-written ones in both of torch's containers, and the real ones where they are."""

import json
import logging
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epmvg_hf.data.benchmarks import BENCHMARKS, SplitRequest
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.readers.flickr30k_entities import Flickr30kEntities
from epmvg_hf.data.readers.transvg_index import IndexFile
from tests.fixtures.index_files import COCO, COCO_42, COCO_ROWS, FLICKR, KINDS, REFERIT, write
from tests.fixtures.paths import REAL_DATA


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "data", "unc")


def find(data_dir, kind="unc", split="train", **options) -> IndexFile | None:
    name, split_by, *_ = KINDS[kind]
    return IndexFile.find(SplitRequest.resolve(BENCHMARKS[name], Path(data_dir), split, split_by, **options))


def load(data_dir, kind="unc", split="train", **options):
    return open_source(find(data_dir, kind, split), **options)


def rows(dataset) -> list[tuple]:
    return [
        (row["image_id"], row.get("ann_id"), row["expression"], pytest.approx(row["box"], rel=1e-6)) for row in dataset
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [False, True])
def test_rows(tmp_path, kind, zipped):
    root = write(tmp_path / "data", kind, _use_new_zipfile_serialization=zipped)
    dataset = load(root, kind)
    *_, expected = KINDS[kind]
    assert rows(dataset) == expected
    assert [row["image"].size for row in dataset] == [(100, 80)] * (len(expected) - 1) + [(20, 20)]
    others = {"ann_id"} if kind != "flickr" else set()
    assert set(dataset.column_names) == {"image", "image_id", "expression", "box", *others}


@pytest.mark.parametrize("box", [(22, 3, 59, 72), np.array([22, 3, 59, 72]), [np.int64(22), np.float32(3), 59, 72.0]])
def test_kinds_of_numbers(tmp_path, box):
    root = write(tmp_path / "data", "referit", [("42.jpg", "42_7.pth", box, "bag", [])])
    assert rows(load(root, "referit")) == [("42", "42_7", "bag", [22, 3, 60, 73])]


@pytest.mark.parametrize(
    ("kind", "split", "file"),
    [
        ("unc", "val", "val"),
        ("unc", "validation", "val"),
        ("unc", "testA", "testA"),
        ("unc", "testB", "testB"),
        ("gref_umd", "test", "test"),
        ("referit", "trainval", "trainval"),
    ],
)
def test_split_names(tmp_path, kind, split, file):
    dataset = load(write(tmp_path / "data", kind, split=file), kind, split)
    assert str(dataset.split) == ("validation" if split == "val" else split)
    assert rows(dataset) == KINDS[kind][-1]


def test_streaming_and_processes_give_equal_rows(folder, tmp_path):
    streamed = load(folder, streaming=True)
    assert rows(streamed) == COCO_ROWS
    assert streamed.num_shards == 2
    assert rows(load(folder, num_proc=2, cache_dir=str(tmp_path / "cache"))) == COCO_ROWS


@pytest.mark.parametrize("place", [".", "data/unc", "split/unc", "split/data/unc", "ln_data/unc"])
def test_places(folder, place):
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / "unc" / "unc_train.pth").rename(folder / place / "unc_train.pth")
    assert find(folder).path == folder / place / "unc_train.pth"
    assert rows(load(folder)) == COCO_ROWS


def test_missing_files(folder):
    assert find(folder, split="testA") is None
    assert find(folder, "unc+") is None
    request = SplitRequest.resolve(BENCHMARKS["refcoco"], folder, "val")
    assert IndexFile.looks_for(request) == "unc/unc_val.pth"
    google = SplitRequest.resolve(BENCHMARKS["refcoco"], folder, "train", "google")
    assert IndexFile.find(google) is None
    assert IndexFile.looks_for(google) == "(for split_by='unc' only) an index file .pth"


def test_only_union_boxes(tmp_path):
    assert find(tmp_path, "flickr", boxes="any") is None
    root = write(tmp_path / "data", "flickr")
    with pytest.raises(ValueError, match=r'boxes must be "union" for .*flickr_train\.pth, which has no other boxes'):
        find(root, "flickr", boxes="any")


# Images and the cache


def test_missing_images(folder):
    (folder / "train2014" / COCO_42).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*COCO_train2014_000000000042\.jpg"):
        load(folder)
    assert rows(load(folder, missing_images="skip")) == COCO_ROWS[2:]
    kept = load(folder, missing_images="keep")
    assert rows(kept) == COCO_ROWS
    assert [row["image"] is None for row in kept] == [True, True, False]


def test_unchanged_data_is_prepared_once(folder, monkeypatch):
    assert rows(load(folder)) == COCO_ROWS
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    assert rows(load(folder)) == COCO_ROWS


def test_edited_files_are_seen(folder):
    assert rows(load(folder)) == COCO_ROWS
    path = folder / "unc" / "unc_train.pth"
    write(folder, "unc", [(COCO_42, "482127.pth", [30.58, 9.03, 29.39, 42.79], "guy on the right", [])])
    assert rows(load(folder)) == [("42", "482127", "guy on the right", [30.58, 9.03, 59.97, 51.82])]
    Image.new("RGB", (50, 40)).save(folder / "train2014" / COCO_42)
    with pytest.raises(ValueError, match=r"unc_train\.pth, row \[0\]: the box .* is not within the 50 x 40 pixels"):
        load(folder)
    path.unlink()
    assert find(folder) is None


# Files of unknown origin

NAMED = ", expected ('COCO_train2014_<12 digits>.jpg', '<annotation>.pth', [x, y, width, height], expression, attrib"
PIXELS = ", expected 4 numbers of pixels."
PROBLEMS = [
    ("unc", None, "is None" + NAMED),
    ("unc", COCO[0][:4], NAMED),
    ("unc", dict.fromkeys(range(5)), "is {0: None, 1: None, 2: None, 3: None, ...}" + NAMED),
    ("unc", (7, *COCO[0][1:]), "names 7" + NAMED),
    ("unc", ("../42.jpg", *COCO[0][1:]), "names '../42.jpg'" + NAMED),
    ("unc", ("COCO_train2014_42.jpg", *COCO[0][1:]), "names 'COCO_train2014_42.jpg'" + NAMED),
    ("unc", (f"{COCO_42}\n", *COCO[0][1:]), r"42.jpg\n'" + NAMED),
    ("unc", (COCO_42, "../1.pth", *COCO[0][2:]), "names '../1.pth'" + NAMED),
    ("unc", (COCO_42, "\uff11.pth", *COCO[0][2:]), "names '\uff11.pth'" + NAMED),
    ("unc", (COCO_42, 482127, *COCO[0][2:]), "names 482127" + NAMED),
    ("unc", (*COCO[0][:2], [1, 2, 3], *COCO[0][3:]), "has the box [1, 2, 3]" + PIXELS),
    ("unc", (*COCO[0][:2], "1234", *COCO[0][3:]), "has the box '1234'" + PIXELS),
    ("unc", (*COCO[0][:2], [1, 2, 3, "4"], *COCO[0][3:]), "has the box [1, 2, 3, '4']" + PIXELS),
    ("unc", (*COCO[0][:2], [1, 2, 3, True], *COCO[0][3:]), "has the box [1, 2, 3, True]" + PIXELS),
    ("unc", (*COCO[0][:2], [1, 2, 3, float("nan")], *COCO[0][3:]), "has the box [1, 2, 3, nan]" + PIXELS),
    ("unc", (*COCO[0][:2], [1, 2, 3, 10**400], *COCO[0][3:]), PIXELS),
    ("unc", (*COCO[0][:2], np.ones((4, 4)), *COCO[0][3:]), PIXELS),
    ("unc", (*COCO[0][:2], [1, 2, 0, 4], *COCO[0][3:]), "the box [1, 2, 1, 6] is empty or inverted"),
    ("unc", (*COCO[0][:2], [-5, 2, 9, 4], *COCO[0][3:]), "the box [-5, 2, 4, 6] starts outside the image"),
    ("unc", (*COCO[0][:3], ["guy"], []), "has the expression ['guy'], expected a string."),
    ("unc", (*COCO[0][:3], " ", []), "the expression is ' ', expected words"),
    ("referit", (COCO_42, *REFERIT[0][1:]), f"names '{COCO_42[:12]}...{COCO_42[-13:]}', expected ('<image>.jpg', "),
    ("referit", ("42.jpg", "42.pth", *REFERIT[0][2:]), "names '42.pth', expected ('<image>.jpg', '<image>_<region>.p"),
    ("referit", (*REFERIT[0][:2], [9, 3, 7, 72], "bag", []), "the box [9, 3, 8, 73] is empty or inverted"),
    ("flickr", COCO[0], ", expected ('<image>.jpg', [xmin, ymin, xmax, ymax], expression)."),
    ("flickr", ("a.jpg", *FLICKR[0][1:]), "names 'a.jpg', expected ('<image>.jpg', [xmin, ymin, xmax, ymax], expre"),
    ("flickr", ("42.jpg", None, "bride"), "has the box None" + PIXELS),
]


@pytest.mark.parametrize(("kind", "entry", "message"), PROBLEMS)
def test_problems(tmp_path, caplog, kind, entry, message):
    good = KINDS[kind][-2][1]
    root = write(tmp_path / "data", kind, [good, entry])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(root, kind)
    assert str(error.value).startswith(f"{root}/{kind}/{kind}_train.pth, row [1]")
    assert len(str(error.value)) < 400
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.builder"):
        assert rows(load(root, kind, errors="skip", streaming=True)) == [KINDS[kind][-1][-1]]
    assert message in caplog.text


def test_problems_are_counted_and_passed_over_alike(tmp_path):
    root = write(tmp_path / "data", "unc", [None, COCO[0], None])
    with pytest.raises(ValueError, match=r"row \[0\] is None.* \(1 more such problems\)"):
        list(load(root, streaming=True))
    assert rows(load(root, errors="skip")) == COCO_ROWS[:1]
    assert rows(load(root, errors="skip", streaming=True)) == COCO_ROWS[:1]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("entries", "message"),
    [([], "has no rows, expected at least one"), ({"a": 1}, "holds {'a': 1}, expected a list of tuples")],
)
def test_bad_files(tmp_path, entries, message, zipped):
    root = write(tmp_path / "data", "unc", entries, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=re.escape(f"unc_train.pth {message}.")):
        load(root, errors="skip")


def test_tensors_are_refused(tmp_path):
    root = write(tmp_path / "data", "unc", [(*COCO[0][:2], torch.ones(4), *COCO[0][3:])])
    with pytest.raises(ValueError, match=r"unc_train\.pth .*tensors"):
        load(root)


def test_attributes_are_not_looked_at(tmp_path):
    entries = [(*COCO[0][:4], "anything")]
    assert rows(load(write(tmp_path / "data", "unc", entries))) == COCO_ROWS[:1]


# The real files

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the real annotations")


def load_real(kind: str, cache: Path):
    dataset = load(REAL_DATA / "transvg_index", kind, "val", missing_images="keep", cache_dir=str(cache))
    return dataset.remove_columns("image")


@needs_real_data
@pytest.mark.parametrize("kind", ["unc", "unc+", "gref_umd"])
def test_real_validation_splits_of_refcoco(kind, tmp_path):  # row by row in test_refer_api
    dataset = load_real(kind, tmp_path)
    name, split_by, *_ = KINDS[kind]
    counts = BENCHMARKS[name].counts[split_by, "validation"]
    assert len(dataset) == counts.expressions
    assert len(set(dataset["ann_id"])) == counts.references  # each object has one reference
    assert len(set(dataset["image_id"])) == counts.images
    ids = dataset["image_id"][:]
    assert 1 + sum(one != other for one, other in pairwise(ids)) == counts.images


@needs_real_data
def test_real_validation_split_of_referitgame(tmp_path):
    dataset = load_real("referit", tmp_path)
    assert len(dataset) == 5_842
    folder = REAL_DATA / "referitgame"
    queries, boxes, sizes = (
        json.loads((folder / f"referit_{name}.json").read_text()) for name in ("query_val", "bbox", "imsize")
    )
    expected = Counter()
    for region, expressions in queries.items():
        xmin, ymin, xmax, ymax = boxes[region]
        for expression in expressions:
            expected[region.split("_")[0], region, expression, xmin, ymin, xmax + 1, ymax + 1] += 1
    found = Counter((row["image_id"], row["ann_id"], row["expression"], *row["box"]) for row in dataset)
    assert found == expected
    for row in dataset:
        width, height = sizes[f"{row['image_id']}.jpg"]
        assert row["box"][2] <= width and row["box"][3] <= height


@needs_real_data
def test_real_validation_split_of_flickr30k_entities(tmp_path):
    dataset = load_real("flickr", tmp_path)
    assert len(dataset) == 14_433
    # Without images, so that the official boxes are not scaled to the reduced ones that are there.
    data = REAL_DATA / "flickr30k_entities"
    request = SplitRequest.resolve(BENCHMARKS["flickr30k_entities"], data, "val", image_dir=tmp_path)
    official = open_source(Flickr30kEntities.find(request), "keep", cache_dir=str(tmp_path))
    by_image = [{}, {}]
    for images, phrases in zip(by_image, (dataset, official.remove_columns("image")), strict=True):
        for row in phrases:
            images.setdefault(row["image_id"], []).append(row)
    assert set(by_image[0]) == set(by_image[1]) and len(by_image[0]) == 1_000
    num_empty = 0
    for image_id, ours in by_image[0].items():
        for short, full in zip(ours, by_image[1][image_id], strict=True):
            assert short["box"] == full["box"]
            letters = iter(full["expression"].lower())
            if not all(letter in letters for letter in short["expression"].replace(" ", "")):
                assert short["expression"] == "unk"
                num_empty += 1
    assert num_empty == 5
