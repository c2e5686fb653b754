"""Tests of the ReferItGame reader on hand-written files, and on the real ones where they are."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from epmvg_hf.data.benchmarks import BENCHMARKS, SplitRequest
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.readers import referitgame
from epmvg_hf.data.readers.referitgame import ReferItJson
from tests.fixtures.paths import REAL_DATA
from tests.fixtures.referit_files import BOXES, SIZES, TRAIN, VAL, write

BENCHMARK = BENCHMARKS["referitgame"]


# (image_id, expression, ann_id, sent_id, box in 0-based half-open pixels of the image, which is 40 x 20 or for 22.jpg
# stored at 80 x 10)
TRAIN_ROWS = [
    ("11", "Sky", "11_1", "11_1-0", [0, 0, 40, 5]),
    ("11", "the sky", "11_1", "11_1-1", [0, 0, 40, 5]),
    ("11", "bottom left", "11_2", "11_2-0", [0, 10, 10, 20]),
    ("11", "bottom left", "11_2", "11_2-1", [0, 10, 10, 20]),
    ("22", "-bridge", "22_3", "22_3-0", [14, 4, 16, 4.5]),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "data")


def find(data_dir: Path, split: str, split_by: str = "standard") -> ReferItJson | None:
    return ReferItJson.find(SplitRequest.resolve(BENCHMARK, data_dir.resolve(), split, split_by))


def load(data_dir: Path, split: str = "train", missing_images: str = "error", **options):
    return open_source(find(data_dir, split), missing_images, **options)


def rows(dataset) -> list[tuple]:
    return [tuple(row[field] for field in ("image_id", "expression", "ann_id", "sent_id", "box")) for row in dataset]


def test_rows(folder):
    dataset = load(folder)
    assert rows(dataset) == TRAIN_ROWS
    assert dataset.column_names == ["image", "image_id", "expression", "box", "ann_id", "sent_id"]
    assert [image.size for image in dataset["image"]] == [(40, 20)] * 4 + [(80, 10)]
    image = dataset.data.column("image")[0].as_py()
    assert image == {"bytes": None, "path": str(folder / "referit" / "images" / "11.jpg")}


def test_without_sizes_boxes_are_of_the_stored_image(folder):
    (folder / "referit_imsize.json").unlink()
    assert rows(load(folder))[:4] == TRAIN_ROWS[:4]
    assert rows(load(folder))[4][-1] == [7, 8, 8, 9]


def test_splits(folder):
    assert rows(load(folder, "val")) == [("33", VAL["33_1"][0], "33_1", "33_1-0", [0, 0, 20, 20])]
    union = rows(load(folder, "trainval"))
    assert union == rows(load(folder, "train")) + rows(load(folder, "validation"))
    (folder / "referit_query_trainval.json").write_text(json.dumps(VAL))
    assert rows(load(folder, "trainval")) == rows(load(folder, "validation"))


@pytest.mark.parametrize("place", ["referit", "data", "data/metadata", "referit/data/metadata"])
def test_places(folder, place):
    (folder / place).mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        path.rename(folder / place / path.name)
    assert rows(load(folder)) == TRAIN_ROWS


@pytest.mark.parametrize("name", ["referit_query_train.json", "referit_bbox.json"])
def test_missing_files_are_not_found(folder, name):
    assert find(folder, "test") is None
    (folder / name).unlink()
    assert find(folder, "train") is None
    request = SplitRequest.resolve(BENCHMARK, folder, "trainval")
    assert ReferItJson.looks_for(request) == (
        "referit_query_trainval.json (or referit_query_train.json and referit_query_val.json) with referit_bbox.json "
        "(there or in referit, data, data/metadata, referit/data/metadata)"
    )
    with pytest.raises(FileNotFoundError, match=r"No expressions of the test split .* expected referit_query_test\.j"):
        ReferItJson(folder, "test", request.images)


def test_other_ways_and_benchmarks_are_not_found(folder):
    assert find(folder, "train", "unc") is None
    assert ReferItJson.find(SplitRequest.resolve(BENCHMARKS["refcoco"], folder, "train")) is None


def test_streaming_and_processes_give_equal_rows(folder, tmp_path):
    streamed = load(folder, streaming=True)
    assert streamed.num_shards == 2
    assert rows(streamed) == TRAIN_ROWS
    assert rows(load(folder, num_proc=2, cache_dir=str(tmp_path / "cache"))) == TRAIN_ROWS


def test_missing_images(folder):
    (folder / "referit" / "images" / "22.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images of the train split are missing .*22\.jpg"):
        load(folder)
    assert rows(load(folder, missing_images="skip")) == TRAIN_ROWS[:4]
    kept = load(folder, missing_images="keep")
    assert kept[4]["image"] is None and kept[4]["box"] == [7, 8, 8, 9]


def test_edits_are_seen(folder):
    assert rows(load(folder)) == TRAIN_ROWS
    (folder / "referit_bbox.json").write_text(json.dumps({**BOXES, "11_1": [0, 0, 39, 5]}))
    assert load(folder)[0]["box"] == [0, 0, 40, 6]
    (folder / "referit_query_train.json").write_text(json.dumps({**TRAIN, "11_1": ["Sun", "the sky"]}))
    assert load(folder)[0]["expression"] == "Sun"
    (folder / "referit_imsize.json").write_text(json.dumps({**SIZES, "11.jpg": [80, 20]}))
    assert load(folder)[0]["box"] == [0, 0, 20, 6]
    Image.new("RGB", (80, 40)).save(folder / "referit" / "images" / "11.jpg")
    assert load(folder)[0]["box"] == [0, 0, 40, 12]


def test_unchanged_data_is_prepared_once(folder, monkeypatch):
    load(folder)
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    monkeypatch.setattr(referitgame, "read_json", None)
    assert rows(load(folder)) == TRAIN_ROWS


def test_two_folders_do_not_share_a_cache(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", {**TRAIN, "11_1": ["Sun"]})
    for path in (path for root in (one, two) for path in root.rglob("*.*")):
        os.utime(path, ns=(0, 0))
    assert [load(root)[0]["expression"] for root in (one, two)] == ["Sky", "Sun"]


# Files of unknown origin

BOX = {name: box for name, box in BOXES.items() if name != "22_3"}
SIZE = {name: size for name, size in SIZES.items() if name != "22.jpg"}
BRIDGE = "referit_query_train.json, region 22_3: "

# (the file, its content, what is wrong with region 22_3 or its image)
PROBLEMS = [
    ("boxes", BOX, "referit_bbox.json: 22_3 is missing, expected it once"),
    (
        "boxes",
        {**BOX, "22_3": [1, 2, 3]},
        "referit_bbox.json: region 22_3 has the box [1, 2, 3], expected [xmin, ymin",
    ),
    ("boxes", {**BOX, "22_3": [1, 2, 3, 4, 5]}, "region 22_3 has the box [1, 2, 3, 4, 5]"),
    ("boxes", {**BOX, "22_3": [1, 2, 3, 4.5]}, "region 22_3 has the box [1, 2, 3, 4.5]"),
    ("boxes", {**BOX, "22_3": [False, 2, 3, 4]}, "region 22_3 has the box [False, 2, 3, 4]"),
    ("boxes", {**BOX, "22_3": [1, 2, 3, "4"]}, "region 22_3 has the box [1, 2, 3, '4']"),
    ("boxes", {**BOX, "22_3": [-1, 2, 3, 4]}, "region 22_3 has the box [-1, 2, 3, 4]"),
    ("boxes", {**BOX, "22_3": [1, 2, 3, 10**400]}, "region 22_3 has the box [1, 2, 3, 1000"),
    ("boxes", {**BOX, "22_3": [1, 2, 3, float("nan")]}, "region 22_3 has the box [1, 2, 3, nan]"),
    ("boxes", {**BOX, "22_3": [3, 2, 2, 4]}, "region 22_3 has the box [3, 2, 2, 4]"),
    ("boxes", {**BOX, "22_3": None}, "region 22_3 has the box None"),
    ("boxes", {**BOX, "22_3": [1, 2, 42, 4]}, BRIDGE + "the box [1, 2, 43, 5] is not within the "),
    ("boxes", json.dumps(BOX)[:-1] + ', "22_3": [0, 0, 1, 1], "22_3": [0, 0, 2, 2]}', "22_3 is there twice"),
    ("train", {**TRAIN, "22_3": ["-bridge", ""]}, BRIDGE + "the expression is '', expected words"),
    ("train", {**TRAIN, "22_3": ["-bridge", " \n"]}, BRIDGE + "the expression is ' \\n', expected words"),
    ("train", {**TRAIN, "22_3": ["-bridge", None]}, BRIDGE + "the expression is None, expected words"),
    ("train", {**TRAIN, "22_3": []}, BRIDGE + "it has [], expected a list of expressions"),
    ("train", {**TRAIN, "22_3": "bridge"}, BRIDGE + "it has 'bridge', expected a list of expressions"),
    (
        "train",
        {**TRAIN, "22_x": ["bridge"]},
        "referit_query_train.json: '22_x' is not the name of a region, expected <digits>_<digits>",
    ),
    ("train", {**TRAIN, "22": ["bridge"]}, "referit_query_train.json: '22' is not the name of a region"),
    ("train", {**TRAIN, "../22_3": ["bridge"]}, "referit_query_train.json: '../22_3' is not the name of a region"),
    ("train", {**TRAIN, "\uff12_3": ["bridge"]}, "is not the name of a region"),
    ("train", {**TRAIN, "22_3\n": ["bridge"]}, "is not the name of a region"),
    (
        "train",
        json.dumps(TRAIN)[:-1] + ', "22_3": ["a"]}',
        "train.json: region 22_3 is there twice, expected each once",
    ),
    ("sizes", SIZE, "referit_imsize.json: 22.jpg is missing, expected it once"),
    ("sizes", {**SIZE, "22.jpg": [40]}, "referit_imsize.json: 22.jpg has the size [40], expected [width, height]"),
    ("sizes", {**SIZE, "22.jpg": [0, 20]}, "22.jpg has the size [0, 20]"),
    ("sizes", {**SIZE, "22.jpg": [40.0, 20]}, "22.jpg has the size [40.0, 20]"),
    ("sizes", {**SIZE, "22.jpg": {"a": 1}}, "22.jpg has the size {'a': 1}"),
]


@pytest.mark.parametrize(("file", "content", "message"), PROBLEMS)
def test_problems(tmp_path, file, content, message):
    root = write(tmp_path / "data", **{file: content})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(root)
    assert str(root) in str(error.value) and "\n" not in str(error.value)
    kept = rows(load(root, errors="skip"))
    assert kept[:4] == TRAIN_ROWS[:4]
    assert len(kept) <= 5  # what is wrong is left out, and nothing else

    with pytest.raises(ValueError, match=re.escape(message)):
        list(load(root, streaming=True))


def test_problems_are_counted_and_logged(tmp_path, caplog):
    root = write(tmp_path / "data", {**TRAIN, "x": ["a"], "y": ["b"]})
    with pytest.raises(
        ValueError, match=r"'x' is not the name of a region, expected <digits>_<digits>\. \(1 more such problems\)"
    ):
        load(root)
    assert rows(load(root, errors="skip")) == TRAIN_ROWS
    assert "left out" in caplog.text and "'y' is not the name of a region" in caplog.text


def test_region_in_train_and_val(tmp_path):
    root = write(tmp_path / "data")
    (root / "referit_query_val.json").write_text(json.dumps({**VAL, "22_3": ["bridge"]}))
    with pytest.raises(ValueError, match=r"referit_query_val\.json: region 22_3 is there twice"):
        load(root, "trainval")
    assert len(load(root, "trainval", errors="skip")) == 6


def test_region_without_expressions_elsewhere_is_no_problem(tmp_path):
    boxes = json.dumps(BOXES)[:-1] + ', "44_1": "never looked at", "44_1": []}'
    assert rows(load(write(tmp_path / "data", boxes=boxes))) == TRAIN_ROWS


@pytest.mark.parametrize("file", ["train", "boxes", "sizes"])
@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"a": 1} b', "[" * 100_000, '{"a": ' * 100_000])
def test_file_that_is_no_json_object(tmp_path, file, content):
    root = write(tmp_path / "data", **{file: content})
    for errors in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"json (cannot be read as UTF-8 JSON|has a \w+ at its top)"):
            load(root, errors=errors)


def test_file_of_another_encoding(folder):
    (folder / "referit_query_train.json").write_text(json.dumps(TRAIN), encoding="utf-16")
    with pytest.raises(ValueError, match=r"referit_query_train\.json cannot be read as UTF-8 JSON"):
        load(folder)


def test_huge_file(folder, monkeypatch):
    monkeypatch.setattr(referitgame, "MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match=r"referit_bbox\.json has 1\d\d bytes, expected at most 100"):
        load(folder)


# The real files


@pytest.mark.skipif(not (REAL_DATA / "referitgame").is_dir(), reason="needs the real ReferItGame")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_splits(split, tmp_path):
    dataset = load(REAL_DATA / "referitgame", split, "keep", cache_dir=str(tmp_path))
    counts = BENCHMARK.counts["standard", split]
    columns = dataset.select_columns(["image_id", "expression", "box", "ann_id", "sent_id"]).to_dict()
    assert len(dataset) == counts.expressions == len(set(columns["sent_id"]))
    assert len(set(columns["ann_id"])) == counts.references
    assert len(set(columns["image_id"])) == counts.images
    changes = sum(one != two for one, two in zip(columns["image_id"], columns["image_id"][1:], strict=False))
    assert changes == counts.images - 1  # so the rows of each image are consecutive

    queries = json.loads(
        (REAL_DATA / "referitgame" / f"referit_query_{'val' if split == 'validation' else split}.json").read_text()
    )
    boxes = json.loads((REAL_DATA / "referitgame" / "referit_bbox.json").read_text())
    expected = sorted(
        (region, expression, [x1, y1, x2 + 1, y2 + 1])
        for region, expressions in queries.items()
        for expression in expressions
        for x1, y1, x2, y2 in [boxes[region]]
    )
    assert sorted(zip(columns["ann_id"], columns["expression"], columns["box"], strict=True)) == expected
