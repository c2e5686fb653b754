"""Tests of the reader of the Hub's parquet files on hand-written ones with the columns and types of the real ones."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from epmvg_hf.data.benchmarks import BENCHMARKS, Counts, SplitRequest
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.readers import hub_parquet
from epmvg_hf.data.readers.hub_parquet import HubParquet

LMMS_SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(),
        "answer": pa.list_(pa.string()),
        "segmentation": pa.list_(pa.float32()),
        "bbox": pa.list_(pa.float32()),
        "iscrowd": pa.int8(),
        "file_name": pa.string(),
    }
)
SENTENCE = {"raw": pa.string(), "sent": pa.string(), "sent_id": pa.int64(), "tokens": pa.list_(pa.string())}
JXU_SCHEMA = pa.schema(
    {
        "sent_ids": pa.list_(pa.int64()),
        "file_name": pa.string(),
        "ann_id": pa.int64(),
        "ref_id": pa.int64(),
        "image_id": pa.int64(),
        "split": pa.string(),
        "sentences": pa.list_(pa.struct(SENTENCE)),
        "category_id": pa.int64(),
        "raw_anns": pa.string(),
        "raw_image_info": pa.string(),
        "raw_sentences": pa.string(),
        "image_path": pa.string(),
        "bbox": pa.list_(pa.float64()),
        "captions": pa.list_(pa.string()),
        "global_image_id": pa.string(),
        "anns_id": pa.string(),
    }
)
NAMES = {"11": "COCO_train2014_000000000011.jpg", "22": "COCO_train2014_000000000022.jpg"}


def encode(color: str, size: tuple[int, int] = (40, 20), kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, kind)
    return content.getvalue()


IMAGES = {"11": encode("red"), "22": encode("blue", (30, 20))}


def lmms_row(image: str, number: int, expressions: list[str], bbox: list[float], /, **changes) -> dict:
    row = {
        "question_id": f"90{number}",
        "image": {"bytes": IMAGES[image], "path": None},
        "question": "Please carefully observe the area circled in the image and come up with a caption for the area.",
        "answer": expressions,
        "segmentation": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "bbox": bbox,
        "iscrowd": 0,
        "file_name": f"COCO_train2014_0000000000{image}_{number}.jpg",
    }
    return {**row, **changes}


def jxu_row(
    image: str, number: int, expressions: list[str], bbox: list[float], xyxy: bool = True, /, **changes
) -> dict:
    sentences = [
        {"raw": text.upper(), "sent": text, "sent_id": 10 * number + index, "tokens": text.split()}
        for index, text in enumerate(expressions)
    ]
    x, y, width, height = bbox
    raw = {"segmentation": [[1.5, 2, 3, 4]], "area": 7.5, "iscrowd": 0, "bbox": bbox, "id": 900 + number}
    info = {
        "license": 3,
        "file_name": NAMES[image],
        "height": 20,
        "width": 40 if image == "11" else 30,
        "id": int(image),
    }
    row = {
        "sent_ids": [each["sent_id"] for each in sentences],
        "file_name": f"COCO_train2014_0000000000{image}_{number}.jpg",
        "ann_id": 900 + number,
        "ref_id": number,
        "image_id": int(image),
        "split": "val",
        "sentences": sentences,
        "category_id": 1,
        "raw_anns": json.dumps(raw),
        "raw_image_info": json.dumps(info),
        "raw_sentences": json.dumps(sentences),
        "image_path": f"coco/train2014/{NAMES[image]}",
        "bbox": [x, y, x + width, y + height] if xyxy else bbox,
        "captions": expressions,
        "global_image_id": f"coco.{image}",
        "anns_id": str(900 + number),
    }
    return {**row, **changes}


OBJECTS = [
    ("11", 0, ["Red box", "the left one"], [1.5, 2, 10, 5]),
    ("22", 1, ["blue"], [0, 0, 30, 10]),
    ("11", 2, ["Red box"], [20, 3.25, 20, 16.75]),
]
# (image_id, expression, ann_id, box in 0-based half-open pixels); the rows of an image are brought together
ROWS = [
    ("11", "Red box", "900", [1.5, 2, 11.5, 7]),
    ("11", "the left one", "900", [1.5, 2, 11.5, 7]),
    ("11", "Red box", "902", [20, 3.25, 40, 20]),
    ("22", "blue", "901", [0, 0, 30, 10]),
]


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = LMMS_SCHEMA if "question" in rows[0] else JXU_SCHEMA
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)


def write_lmms(root: Path, name: str = "data/val-00000-of-00001.parquet", changed: int = 0, **changes) -> Path:
    """A folder with one file, of which one row has other values."""
    rows = [lmms_row(*each, **(changes if index == changed else {})) for index, each in enumerate(OBJECTS)]
    write_parquet(root / name, rows)
    return root


def write_jxu(
    root: Path,
    name: str = "data/validation-00000-of-00001-bfeafdc84ca37aa2.parquet",
    changed: int = 0,
    xyxy: bool = True,
    file_split: str = "val",
    **changes,
) -> Path:
    rows = [
        jxu_row(*each, xyxy, **{"split": file_split, **(changes if index == changed else {})})
        for index, each in enumerate(OBJECTS)
    ]
    write_parquet(root / name, rows)
    (root / "train2014").mkdir(exist_ok=True)
    for image, content in IMAGES.items():
        (root / "train2014" / NAMES[image]).write_bytes(content)
    return root


def request(data_dir, split="val", split_by=None, benchmark=BENCHMARKS["refcoco"], cache_dir=None) -> SplitRequest:
    return SplitRequest.resolve(benchmark, data_dir, split, split_by, cache_dir=cache_dir)


def is_found(data_dir, split="val", split_by=None) -> bool:
    return HubParquet.find(request(data_dir, split, split_by)) is not None


def load(data_dir, split="val", split_by=None, benchmark=BENCHMARKS["refcoco"], cache_dir=None, **options):
    source = HubParquet.find(request(data_dir, split, split_by, benchmark, cache_dir))
    return open_source(source, cache_dir=cache_dir, **options)


def rows(dataset) -> list[tuple]:
    return [tuple(row[field] for field in ("image_id", "expression", "ann_id", "box")) for row in dataset]


def paths(dataset) -> list[str]:
    return [image.as_py()["path"] for image in dataset.data.column("image")]


# lmms-lab


def test_lmms_rows(tmp_path):
    dataset = load(write_lmms(tmp_path))
    assert rows(dataset) == ROWS
    assert dataset.column_names == ["image", "image_id", "expression", "box", "ref_id", "ann_id", "sent_id"]
    assert set(dataset["ref_id"]) == set(dataset["sent_id"]) == {None}
    assert [image.size for image in dataset["image"]] == [(40, 20)] * 3 + [(30, 20)]
    assert dataset[0]["image"].getpixel((5, 5))[0] > 200 and dataset[3]["image"].getpixel((5, 5))[2] > 200


def test_lmms_images_are_written_once(tmp_path):
    load(write_lmms(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache" / "epmvg_hf-parquet-images").iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in folder.glob("*.jpg")} == {
        NAMES[key]: IMAGES[key] for key in IMAGES
    }
    again = load(tmp_path / "data", cache_dir=str(tmp_path / "cache"))
    assert paths(again) == [str(folder / NAMES[row[0]]) for row in ROWS]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.parametrize("what", ["folder", "image"])
def test_lmms_images_that_were_deleted_are_written_again(tmp_path, what):
    image, other = (Path(path) for path in paths(load(write_lmms(tmp_path)))[2:])
    untouched = other.stat().st_mtime_ns
    if what == "folder":
        shutil.rmtree(image.parent)
    else:
        image.unlink()
    again = load(tmp_path)
    assert rows(again) == ROWS and again[0]["image"].size == (40, 20)
    assert what == "folder" or other.stat().st_mtime_ns == untouched


def test_lmms_boxes_are_not_scaled_for_a_larger_image(tmp_path):
    content = encode("red", (80, 40), "PNG")
    dataset = load(write_lmms(tmp_path, image={"bytes": content, "path": None}))
    assert rows(dataset) == ROWS and dataset[0]["image"].size == (80, 40)


def test_lmms_splits(tmp_path):
    write_lmms(tmp_path, "data/testA-00000-of-00001.parquet", answer=["in testA"])
    write_lmms(tmp_path, "data/test-00000-of-00001.parquet", answer=["in google's test"])
    write_lmms(tmp_path, "data/testB-00000-of-00001.parquet", answer=["in testB"])
    assert [load(tmp_path, split)[0]["expression"] for split in ("testA", "testB")] == ["in testA", "in testB"]
    assert load(tmp_path, "test", split_by="google")[0]["expression"] == "in google's test"
    (tmp_path / "data" / "testA-00000-of-00001.parquet").unlink()
    assert not is_found(tmp_path, "testA")  # jxu124's "test" would be that, lmms-lab's is not
    assert not is_found(tmp_path, "train") and not is_found(tmp_path, "val")


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A "val" whose first two rows are unc's and whose last row is google's, and the benchmark with such numbers."""
    monkeypatch.setattr(hub_parquet, "MIXED_ROWS", {"refcoco": 3})
    write_lmms(tmp_path)
    return tmp_path, replace(BENCHMARKS["refcoco"], counts={("unc", "validation"): Counts(3, 2, 2)})


def test_lmms_rows_of_two_ways_to_split_are_separated(mixed, tmp_path):
    root, benchmark = mixed
    assert rows(load(root, benchmark=benchmark)) == [ROWS[0], ROWS[1], ROWS[3]]
    assert rows(load(root, split_by="google", benchmark=benchmark)) == [ROWS[2]]

    last = replace(benchmark, counts={("unc", "validation"): Counts(2, 2, 2)})  # the last two rows are unc's
    cache = str(tmp_path / "cache")  # rows prepared in the first one would be taken, as neither files nor code changed
    assert rows(load(root, benchmark=last, cache_dir=cache)) == [ROWS[3], ROWS[2]]
    assert rows(load(root, split_by="google", benchmark=last, cache_dir=cache)) == ROWS[:2]


@pytest.mark.parametrize("counts", [Counts(4, 2, 2), Counts(3, 2, 1), Counts(3, 1, 2)])
def test_lmms_rows_of_two_ways_to_split_that_cannot_be_told_apart(mixed, counts):
    root, benchmark = mixed
    benchmark = replace(benchmark, counts={("unc", "validation"): counts})
    with pytest.raises(ValueError, match=r"data has 3 rows of the validation splits of unc and google together"):
        load(root, benchmark=benchmark)


def test_official_numbers_of_mixed_rows():
    for name, rows_in_val in hub_parquet.MIXED_ROWS.items():
        ways = [BENCHMARKS[name].counts.get((way, "validation")) for way in BENCHMARKS[name].splits]
        assert rows_in_val == sum(counts.references if counts else 5_000 for counts in ways)


# jxu124


@pytest.mark.parametrize("xyxy", [True, False])
def test_jxu_rows(tmp_path, xyxy):
    dataset = load(write_jxu(tmp_path, xyxy=xyxy))
    assert rows(dataset) == ROWS
    assert dataset["ref_id"][:] == ["0", "0", "2", "1"]
    assert dataset["sent_id"][:] == ["0", "1", "20", "10"]
    assert paths(dataset)[0] == str(tmp_path / "train2014" / NAMES["11"])


def test_jxu_boxes_are_scaled_to_the_stored_image(tmp_path):
    write_jxu(tmp_path)
    (tmp_path / "train2014" / NAMES["22"]).write_bytes(encode("blue", (60, 10)))
    assert rows(load(tmp_path))[3][-1] == [0, 0, 60, 5]


def test_jxu_boxes_may_be_rounded(tmp_path):
    assert rows(load(write_jxu(tmp_path, bbox=[1.51, 1.99, 11.5, 7.0]))) == ROWS
    assert rows(load(write_jxu(tmp_path, changed=1, xyxy=False))) == ROWS  # [0, 0, 30, 10] is the same in both


def test_jxu_splits(tmp_path):
    write_jxu(tmp_path, "data/test-00000-of-00001-82af0c1b600890ac.parquet", file_split="testA")
    assert rows(load(tmp_path, "testA")) == ROWS
    assert not is_found(tmp_path, "test", "google")  # theirs are unc's splits, and umd's of RefCOCOg
    write_jxu(tmp_path, "data/train-00000-of-00001.parquet", file_split="train")
    assert rows(load(tmp_path, "train")) == ROWS
    write_jxu(tmp_path, "data/test-00000-of-00001-82af0c1b600890ac.parquet", file_split="test")
    assert rows(load(tmp_path, "test", benchmark=BENCHMARKS["refcocog"])) == ROWS
    with pytest.raises(
        ValueError, match=r"row 0: image_id 11 and split 'test' do not belong .* testA split\. \(2 more"
    ):
        load(tmp_path, "testA")


def test_jxu_missing_images(tmp_path):
    write_jxu(tmp_path)
    (tmp_path / "train2014" / NAMES["22"]).unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 2 images of the validation split are missing .*{NAMES['22']}"):
        load(tmp_path)
    assert rows(load(tmp_path, missing_images="skip")) == ROWS[:3]
    kept = load(tmp_path, missing_images="keep")
    assert rows(kept) == ROWS and kept[3]["image"] is None


# Both

WRITERS = [write_lmms, write_jxu]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "name",
    ["val.parquet", "validation.parquet", "data/val.parquet", "RefCOCO/data/val.parquet", "refcoco/val.parquet"],
)
def test_places(tmp_path, write, name):
    assert rows(load(write(tmp_path, name))) == ROWS


@pytest.mark.parametrize("make_row", [lmms_row, jxu_row])
def test_parts_are_read_in_order(tmp_path, make_row):
    write_jxu(tmp_path, "elsewhere/val.parquet")  # for the images
    for index, each in enumerate(OBJECTS):
        write_parquet(tmp_path / f"val-{index:05}-of-00003.parquet", [make_row(*each)])
    assert rows(load(tmp_path)) == ROWS
    (tmp_path / "val-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"val-00000-of-00003\.parquet, val-00002-.* expected each part exactly once"):
        load(tmp_path)
    for upload in ("94431d5f4bd5b93f", "381ef1aeb196febd"):  # of the same part
        write_jxu(tmp_path, f"train-00000-of-00001-{upload}.parquet", file_split="train")
    with pytest.raises(ValueError, match="expected each part exactly once"):
        load(tmp_path, "train")


@pytest.mark.parametrize("write", WRITERS)
def test_rows_are_the_same_however_they_are_made(tmp_path, write):
    streamed = load(write(tmp_path), streaming=True)
    assert streamed.num_shards == 2
    assert rows(streamed) == ROWS
    assert [row["image"].size for row in streamed] == [(40, 20)] * 3 + [(30, 20)]
    assert rows(load(tmp_path, num_proc=2, cache_dir=str(tmp_path / "cache"))) == ROWS
    assert rows(load(tmp_path, exclude=frozenset({"11"}))) == ROWS[3:]


@pytest.mark.parametrize("write", WRITERS)
def test_edits_are_seen(tmp_path, write):
    assert rows(load(write(tmp_path))) == ROWS
    write(tmp_path, **{"question_id": "7"} if write is write_lmms else {"ann_id": 7})
    assert load(tmp_path)[0]["ann_id"] == "7"


def test_edited_images_are_seen(tmp_path):
    load(write_jxu(tmp_path))
    (tmp_path / "train2014" / NAMES["11"]).write_bytes(encode("red", (80, 40)))
    assert load(tmp_path)[0]["box"] == [3, 4, 23, 14]
    load(write_lmms(tmp_path / "lmms"))
    write_lmms(tmp_path / "lmms", image={"bytes": encode("green", kind="PNG"), "path": None})
    assert load(tmp_path / "lmms")[0]["image"].getpixel((5, 5)) == (0, 128, 0)


@pytest.mark.parametrize("write", WRITERS)
def test_unchanged_data_is_prepared_once(tmp_path, write, monkeypatch):
    load(write(tmp_path))
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    assert rows(load(tmp_path)) == ROWS


def test_other_benchmarks_are_not_found(tmp_path):
    assert HubParquet.find(request(write_lmms(tmp_path), benchmark=BENCHMARKS["flickr30k_entities"])) is None
    assert HubParquet.looks_for(request(tmp_path, "testA", benchmark=BENCHMARKS["refcoco+"])) == (
        "testA-*.parquet or test-*.parquet of lmms-lab/RefCOCOplus or jxu124/refcocoplus (there or in data, "
        "RefCOCOplus/data or refcocoplus/data)"
    )


# Files of unknown origin

BAD_BOX = [[1, 2, 3], None, [1, 2, 3, None], [1, 2, 3, float("nan")], [float("nan")] * 4]
BAD_NAME = [None, "11.jpg", "../COCO_train2014_000000000011_0.jpg", "COCO_train2014_000000000011_0.jpg\n"]
BAD_NAME += ["COCO_train2014_00000000001\uff11_0.jpg"]

# (values of the first row, what is wrong with it)
BOTH_PROBLEMS = [
    *(({"bbox": value}, "row 0: the box is ") for value in BAD_BOX),
    *(({"file_name": value}, "row 0: file_name is ") for value in BAD_NAME),
]
LMMS_PROBLEMS = [
    *BOTH_PROBLEMS,
    ({"bbox": [1, 2, 0, 5]}, "row 0: the box [1.0, 2.0, 0.0, 5.0] is empty, expected x, y, width"),
    ({"bbox": [-9, 2, 12, 5]}, "row 0: the box [-9, 2, 3, 7] starts outside the image"),
    ({"answer": None}, "row 0: the expression is None, expected words"),
    ({"answer": []}, "row 0: the expression is [], expected words"),
    ({"answer": ["Red box", ""]}, "row 0: the expression is '', expected words"),
    ({"answer": ["Red box", None]}, "row 0: the expression is None, expected words"),
]
JXU_PROBLEMS = [
    *BOTH_PROBLEMS,
    ({"bbox": [1.5, 2, 11.5, 7.5]}, "row 0: bbox is [1.5, 2.0, 11.5, 7.5], expected [1.5, 2, 10, 5] (xywh, as in raw"),
    ({"bbox": [1.5, 2, 10.1, 5]}, "expected [1.5, 2, 10, 5] (xywh, as in raw_anns) or [1.5, 2.0, 11.5, 7.0] (xyxy)"),
    ({"image_id": 22}, "row 0: image_id 22 and split 'val' do not belong to COCO_train2014_000000000011_0.jpg of the"),
    ({"image_id": None}, "row 0: image_id None and split 'val' do not belong to"),
    ({"split": "train"}, "row 0: image_id 11 and split 'train' do not belong to "),
    ({"sentences": None}, "row 0: the expression is None, expected words"),
    ({"sentences": []}, "row 0: the expression is [], expected words"),
    ({"sentences": [None]}, "row 0: the expression is None, expected words"),
    ({"sentences": [{"raw": "A", "sent": " "}]}, "row 0: the expression is ' ', expected words"),
    ({"sentences": [{"raw": "A"}]}, "row 0: the expression is None, expected words"),
    ({"raw_anns": None}, "row 0: raw_anns is not valid JSON (Expecting value at character 1)"),
    ({"raw_anns": "[]"}, "row 0: raw_anns is not a JSON object but []"),
    ({"raw_anns": "{'bbox': []}"}, "row 0: raw_anns is not valid JSON ("),
    ({"raw_anns": "{}"}, "row 0: the box is None, expected 4 finite numbers"),
    ({"raw_anns": '{"bbox": [1, 2, 3, true]}'}, "row 0: the box is [1, 2, 3, True]"),
    ({"raw_image_info": "3"}, "row 0: raw_image_info is not a JSON object but 3"),
    ({"raw_image_info": "{}"}, f"row 0: the size of {NAMES['11']} is (None, None), expected its width and height"),
    ({"raw_image_info": '{"width": 40, "height": 0}'}, f"row 0: the size of {NAMES['11']} is (40, 0)"),
]


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [(write_lmms, *problem) for problem in LMMS_PROBLEMS] + [(write_jxu, *problem) for problem in JXU_PROBLEMS],
)
def test_problems_are_raised_or_left_out(tmp_path, write, changes, message):
    write(tmp_path, **changes)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            list(load(tmp_path, streaming=streaming))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    # What is left are the other rows, and of the first one the other sentence if that can be used; a size counts for
    # the whole image.
    left = ROWS[3:] if "the size of" in message else ROWS[2:]
    assert sorted(rows(load(tmp_path, errors="skip"))) in (left, [ROWS[0], *left])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0", "row 0: there is no image in that row, expected the bytes of a JPEG or PNG."),
        (b"<html>not found</html>", "row 0: there is no image in that row, expected the bytes of a JPEG or PNG."),
        (IMAGES["11"][:100], f"row 0: .*{NAMES['11']} has no readable image header"),
        (IMAGES["11"][:-10], f"row 0: .*{NAMES['11']} cannot be decoded to its end"),
        (encode("red", (20, 10)), r"row 2: the box \[20, 3.25, 40, 20\] is not within the "),
    ],
)
def test_lmms_image_problems(tmp_path, content, message):
    write_lmms(tmp_path, image={"bytes": content, "path": "/etc/passwd"})
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"val-00000-of-00001\.parquet, {message}"):
            list(load(tmp_path, streaming=streaming, cache_dir=str(tmp_path / "cache")))
    assert rows(load(tmp_path, errors="skip")) == ROWS[3:]  # no object of that image is left
    for path in tmp_path.glob("cache/epmvg_hf-parquet-images/*/*.jpg"):
        assert path.read_bytes().startswith(b"\xff\xd8")


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": None}])
def test_lmms_rows_without_image(tmp_path, image):
    assert rows(load(write_lmms(tmp_path, image=image))) == ROWS  # the image of object 0 is also that of object 2
    write_lmms(tmp_path, changed=1, image=image)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"val.*\.parquet, row 1: there is no image in that row"):
            list(load(tmp_path, streaming=streaming))
    assert rows(load(tmp_path, errors="skip")) == ROWS[:3]


def test_lmms_images_much_larger_than_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_parquet, "MAX_IMAGES_GROWTH", 0.01)
    with pytest.raises(ValueError, match=rf"the images up to {NAMES['11']} have \d+ bytes, expected at most \d+"):
        load(write_lmms(tmp_path), errors="skip")


def test_other_columns(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "val.parquet")
    expected = "expected each of question_id, answer, bbox, file_name, image once."
    with pytest.raises(ValueError, match=rf"val\.parquet has the columns image, text, {expected}"):
        load(tmp_path)
    (tmp_path / "val.parquet").unlink()
    write_lmms(tmp_path, "val-00000-of-00002.parquet")
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "val-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=rf"val-00001-of-00002\.parquet has the columns image, {expected}"):
        load(tmp_path)
    path = write_jxu(tmp_path / "jxu", "val.parquet") / "val.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("split", table.column("split")), path)
    with pytest.raises(ValueError, match=r"bbox, captions, .*, split, expected each of ref_id, .*, bbox once\."):
        load(tmp_path / "jxu")


def write_other_type(path: Path, column: str, values: pa.Array) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)


# Values of columns that hold something else.
NO_TEXT = [7, 7.5, b"text", ["text"], {"a": "text"}]
NO_ID = NO_TEXT[1:]
NO_BOX = ["text", 7, ["1", "2", "3", "4"], [[1.0]], {"a": 1}]
NO_TEXTS = ["text", 7, [1], [b"text"], {"a": 1}]
NO_SENTENCES = [
    *NO_TEXTS,
    {"sent": "a"},
    [{"sent": "a"}],
    [{"sent": 1, "sent_id": 1}],
    [{"sent": "a", "sent_id": 0.5}],
]
NO_IMAGE = ["text", b"bytes", {"path": "a.jpg"}, {"bytes": "text"}, [{"bytes": b"bytes"}], None]
WRONG_VALUES = [
    (write_lmms, {"question_id": NO_ID, "answer": NO_TEXTS, "bbox": NO_BOX, "file_name": NO_TEXT, "image": NO_IMAGE}),
    (write_jxu, dict.fromkeys(("ref_id", "ann_id", "image_id"), NO_ID)),
    (write_jxu, dict.fromkeys(("file_name", "split", "raw_anns", "raw_image_info"), NO_TEXT)),
    (write_jxu, {"bbox": NO_BOX, "sentences": NO_SENTENCES}),
]


@pytest.mark.parametrize(
    ("write", "column", "value"),
    [(write, column, value) for write, columns in WRONG_VALUES for column in columns for value in columns[column]],
)
def test_other_types_of_columns(tmp_path, write, column, value):
    path = write(tmp_path, "val.parquet") / "val.parquet"
    write_other_type(path, column, pa.array([value] * 3))
    kind = re.escape(str(pq.read_schema(path).field(column).type))
    for errors in ("raise", "skip"):
        with pytest.raises(ValueError, match=rf"val\.parquet: the column {column} is {kind}, expected [\w<>: ,]*\.$"):
            load(tmp_path, errors=errors)


def test_columns_without_any_value(tmp_path):
    """Such a column has a type of its own, that of nothing."""
    path = write_lmms(tmp_path, "val.parquet") / "val.parquet"
    write_other_type(path, "question_id", pa.nulls(3))
    assert load(tmp_path)["ann_id"][:] == [None] * 4
    write_other_type(path, "answer", pa.nulls(3))
    with pytest.raises(ValueError, match=r"val\.parquet, row 0: the expression is None, expected words\."):
        load(tmp_path)


@pytest.mark.parametrize(
    ("write", "column", "kind"),
    [
        (write_lmms, "answer", pa.large_list(pa.large_string())),
        (write_lmms, "bbox", pa.list_(pa.float64(), 4)),
        (write_lmms, "file_name", pa.dictionary(pa.int32(), pa.string())),
        (write_lmms, "question_id", pa.int64()),
        (write_jxu, "ann_id", pa.string()),
        (write_jxu, "ref_id", pa.int32()),
        (write_jxu, "raw_anns", pa.large_string()),
    ],
)
def test_columns_that_another_library_has_written(tmp_path, write, column, kind):
    path = write(tmp_path, "val.parquet") / "val.parquet"
    values = pa.array(pq.read_table(path).column(column).to_pylist())
    write_other_type(path, column, values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind))
    assert pq.read_schema(path).field(column).type == kind
    assert rows(load(tmp_path)) == ROWS


@pytest.mark.parametrize("write", WRITERS)
def test_broken_files(tmp_path, write):
    path = write(tmp_path, "val.parquet") / "val.parquet"
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    without_data = content[:4] + bytes(footer - 4) + content[footer:]
    for broken in (b"", b"PAR1", content[: len(content) // 2], b"x" * 100 + b"PAR1", without_data):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"val\.parquet is not a readable parquet file: [^\n]*[^.\n]\.$"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("write", "text", "column"),
    [
        (write_lmms, b"Red box", "answer"),
        (write_lmms, b"900", "question_id"),
        (write_lmms, b"COCO_train2014_000000000011_0", "file_name"),
        (write_jxu, b"Red box", "sentences"),
    ],
)
def test_text_that_is_not_utf_8(tmp_path, write, text, column):
    path = write(tmp_path, "val.parquet") / "val.parquet"
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(text, b"\xff" + text[1:]))
    for streaming in (False, True):
        problem = rf"val\.parquet, row 0: the column {column} is not UTF-8 \(invalid start byte at byte 0\)\."
        with pytest.raises(ValueError, match=problem):
            list(load(tmp_path, streaming=streaming))
    left = ROWS[3:] if text == b"Red box" else ROWS[2:]  # rows 0 and 2 have that expression
    assert sorted(rows(load(tmp_path, errors="skip"))) == sorted(left)
