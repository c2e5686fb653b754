"""Tests of the reader of the Hub's parquet files on hand-written ones with the columns and types of the real ones."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from epmvg_hf.data.benchmarks import BENCHMARKS, Counts, Wanted
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.files import parquet_files
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


def find(data_dir, split="val", split_by=None, benchmark=BENCHMARKS["refcoco"]) -> HubParquet | None:
    return HubParquet.find(Wanted.check(benchmark, Path(data_dir).resolve(), split, split_by))


def load(data_dir, split="val", missing_images="error", split_by=None, benchmark=BENCHMARKS["refcoco"], **options):
    return open_source(find(data_dir, split, split_by, benchmark), missing_images, **options)


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


def test_lmms_images_are_written_once(tmp_path, monkeypatch):
    written = []
    write_file = parquet_files.write_file
    monkeypatch.setattr(
        parquet_files, "write_file", lambda path, content: written.append(path) or write_file(path, content)
    )
    found = paths(load(write_lmms(tmp_path)))
    assert len(set(found)) == 2 and found[0] == found[1] == found[2]
    assert [path.name for path in written] == [NAMES["11"], NAMES["22"]]
    folder = written[0].parent
    assert found[0] == str(folder / NAMES["11"]) and folder.parent.name == "epmvg_hf-images"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {NAMES[key]: IMAGES[key] for key in IMAGES}
    assert len(load(tmp_path)) == 4 and len(written) == 2


def test_lmms_images_in_another_cache(tmp_path):
    wanted = Wanted.check(BENCHMARKS["refcoco"], write_lmms(tmp_path / "data"), "val")
    source = HubParquet(wanted, find(tmp_path / "data").files, str(tmp_path / "cache"))
    assert rows(open_source(source)) == ROWS
    assert paths(open_source(source))[0].startswith(f"{tmp_path}/cache/epmvg_hf-images/")


def test_lmms_images_that_were_deleted_are_written_again(tmp_path, monkeypatch):
    dataset = load(write_lmms(tmp_path))
    Path(paths(dataset)[0]).unlink()
    monkeypatch.setattr(GroundingBuilder, "_generate_examples", None)  # so nothing is prepared again
    again = load(tmp_path)
    assert rows(again) == ROWS and again[0]["image"].size == (40, 20)


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
    assert find(tmp_path, "testA") is None  # jxu124's "test" would be that, lmms-lab's is not
    assert find(tmp_path, "train") is None and find(tmp_path, "val") is None


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

    last = replace(benchmark, counts={("google", "validation"): Counts(2, 2, 2)})
    cache = str(tmp_path / "cache")  # the prepared rows are the same while files and code are
    assert rows(load(root, split_by="google", benchmark=last, cache_dir=cache)) == [ROWS[3], ROWS[2]]
    assert rows(load(root, benchmark=last, cache_dir=cache)) == ROWS[:2]


@pytest.mark.parametrize("counts", [Counts(4, 2, 2), Counts(3, 2, 1), Counts(3, 1, 2)])
def test_lmms_rows_of_two_ways_to_split_that_cannot_be_told_apart(mixed, counts):
    root, benchmark = mixed
    benchmark = replace(benchmark, counts={("unc", "validation"): counts})
    with pytest.raises(
        ValueError, match=r"data has 3 rows of the validation splits of unc and google together, expec"
    ):
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


@pytest.mark.parametrize(
    ("changed", "bbox", "row"),
    [(0, [1.5, 2, 11.5, 7.5], 0), (2, [20, 3.25, 20, 16.75], 2), (0, [1.5, 2, 10, 5], 2)],
)
def test_jxu_boxes_of_neither_convention(tmp_path, changed, bbox, row):
    write_jxu(tmp_path, changed=changed, bbox=bbox)
    message = (
        rf"ca37aa2\.parquet, row {row}: bbox is \[.*\], expected in all rows \[.*\] \(xywh, as in raw_anns\) or in "
    )
    for errors in ("raise", "skip"):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, errors=errors)


def test_jxu_splits(tmp_path):
    write_jxu(tmp_path, "data/test-00000-of-00001-82af0c1b600890ac.parquet", file_split="testA")
    assert rows(load(tmp_path, "testA")) == ROWS
    assert find(tmp_path, "test", "google") is None  # theirs are unc's splits, and umd's of RefCOCOg
    write_jxu(tmp_path, "data/train-00000-of-00001.parquet", file_split="train")
    assert rows(load(tmp_path, "train")) == ROWS
    write_jxu(tmp_path, "data/test-00000-of-00001-82af0c1b600890ac.parquet", file_split="test")
    assert rows(load(tmp_path, "test", benchmark=BENCHMARKS["refcocog"])) == ROWS
    with pytest.raises(ValueError, match=r"row 0: split is 'test', expected that of the testA split\. \(2 more such"):
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
    with pytest.raises(
        ValueError, match=r"val-00000-of-00003\.parquet, val-00002-of-.* expected each of 3 parts once"
    ):
        load(tmp_path)


def test_two_uploads_of_a_part(tmp_path):
    write_jxu(tmp_path, "data/train-00000-of-00001-94431d5f4bd5b93f.parquet", file_split="train")
    write_jxu(tmp_path, "data/train-00000-of-00001-381ef1aeb196febd.parquet", file_split="train")
    with pytest.raises(ValueError, match="expected each of 1 parts once"):
        load(tmp_path, "train")


@pytest.mark.parametrize("write", WRITERS)
def test_streaming_and_processes_give_equal_rows(tmp_path, write):
    streamed = load(write(tmp_path), streaming=True)
    assert streamed.num_shards == 2
    assert rows(streamed) == ROWS
    assert [row["image"].size for row in streamed] == [(40, 20)] * 3 + [(30, 20)]
    assert rows(load(tmp_path, num_proc=2, cache_dir=str(tmp_path / "cache"))) == ROWS


@pytest.mark.parametrize("write", WRITERS)
def test_excluded_images(tmp_path, write):
    assert rows(load(write(tmp_path), exclude=frozenset({"11"}))) == ROWS[3:]


@pytest.mark.parametrize("write", WRITERS)
def test_edits_are_seen(tmp_path, write):
    assert rows(load(write(tmp_path))) == ROWS
    write(
        tmp_path,
        file_name="COCO_train2014_000000000011_123.jpg",
        **{"question_id": "7"} if write is write_lmms else {"ann_id": 7},
    )
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
    monkeypatch.setattr(GroundingBuilder, "_generate_examples", None)
    assert rows(load(tmp_path)) == ROWS


def test_other_benchmarks_are_not_found(tmp_path):
    assert find(write_lmms(tmp_path), "val", benchmark=BENCHMARKS["flickr30k_entities"]) is None
    assert HubParquet.looks_for(Wanted.check(BENCHMARKS["refcoco+"], tmp_path, "testA")) == (
        "testA-*.parquet or test-*.parquet of lmms-lab/RefCOCOplus or jxu124/refcocoplus (there or in data, "
        "RefCOCOplus/data or refcocoplus/data)"
    )


# Files of unknown origin

BAD_BOX = [[1, 2, 3], [], None, [1, 2, 3, None], [1, 2, 3, float("nan")], [1, 2, 3, float("inf")], [1, 2, 3, 1e30]]
BAD_NAME = [None, "", "11.jpg", "../COCO_train2014_000000000011_0.jpg", "COCO_train2014_11_0.jpg", "/etc/passwd"]
BAD_NAME += ["COCO_train2014_000000000011_0.jpg\n", "COCO_train2014_00000000001\uff11_0.jpg", "a" * 200]

# (values of the first row, what is wrong with it)
BOTH_PROBLEMS = [
    *(({"bbox": value}, "row 0: bbox has the box ") for value in BAD_BOX),
    *(({"file_name": value}, "row 0: file_name is ") for value in BAD_NAME),
]
LMMS_PROBLEMS = [
    *BOTH_PROBLEMS,
    ({"bbox": [1, 2, 0, 5]}, "row 0: the box [1, 2, 1, 7] is empty or inverted"),
    ({"bbox": [-9, 2, 12, 5]}, "row 0: the box [-9, 2, 3, 7] starts outside the image"),
    ({"answer": None}, "row 0: answer is None, expected a list of expressions"),
    ({"answer": []}, "row 0: answer is [], expected a list of expressions"),
    ({"answer": ["Red box", ""]}, "row 0: the expression is '', expected words"),
    ({"answer": ["Red box", None]}, "row 0: the expression is None, expected words"),
    ({"answer": ["a"] * 1001}, "row 0: answer has 1,001 expressions, expected at most 1,000"),
]
JXU_PROBLEMS = [
    *BOTH_PROBLEMS,
    ({"image_id": 22}, "row 0: file_name 'COCO_train2014_000000000011_0.jpg' is not of image_id 22"),
    ({"image_id": None}, "is not of image_id None"),
    ({"split": "train"}, "row 0: split is 'train', expected that of the validation split"),
    ({"sentences": None}, "row 0: sentences is None, expected a list of expressions"),
    ({"sentences": [None]}, "row 0: sentences is [None], expected a list of expressions"),
    ({"sentences": [{"raw": "A", "sent": " "}]}, "row 0: the expression is ' ', expected words"),
    ({"sentences": [{"raw": "A"}]}, "row 0: the expression is None, expected words"),
    ({"raw_anns": None}, "row 0: raw_anns is 'None', expected a JSON object"),
    ({"raw_anns": "[]"}, "row 0: raw_anns is '[]', expected a JSON object"),
    ({"raw_anns": "{'bbox': []}"}, "row 0: raw_anns is \"{'bbox': []}\", expected a JSON object"),
    ({"raw_anns": "[" * 100_000}, "row 0: raw_anns is '[[[["),
    ({"raw_anns": "{}"}, "row 0: raw_anns has the box None, expected 4 finite numbers"),
    ({"raw_anns": '{"bbox": [1, 2, 3, true]}'}, "row 0: raw_anns has the box [1, 2, 3, True]"),
    ({"raw_anns": '{"bbox": [1, 2, 3, Infinity]}'}, "row 0: raw_anns has the box [1, 2, 3, inf]"),
    ({"raw_anns": '{"bbox": [1, 2, 3, ' + "9" * 400 + "]}"}, "row 0: raw_anns has the box [1, 2, 3, 999"),
    ({"raw_image_info": "{}"}, "row 0: raw_image_info has the width and height (None, None), expected pixels"),
    ({"raw_image_info": '{"width": 40, "height": 0}'}, "raw_image_info has the width and height (40, 0)"),
    ({"raw_image_info": '{"width": 40, "height": 20.5}'}, "raw_image_info has the width and height (40, 20.5)"),
]


def check_problem(root: Path, message: str) -> list[tuple]:
    """The problem is raised, also when streaming, or left out; the rows that are left."""
    for streaming in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            list(load(root, streaming=streaming))
        assert str(root) in str(error.value) and "\n" not in str(error.value)
    return rows(load(root, errors="skip"))


@pytest.mark.parametrize(("changes", "message"), LMMS_PROBLEMS)
def test_lmms_problems(tmp_path, changes, message):
    left = check_problem(write_lmms(tmp_path, **changes), message)
    assert sorted(left) in (ROWS[2:], [ROWS[0], *ROWS[2:]])


@pytest.mark.parametrize(("changes", "message"), JXU_PROBLEMS)
def test_jxu_problems(tmp_path, changes, message):
    left = check_problem(write_jxu(tmp_path, **changes), message)
    assert sorted(left) in (ROWS[2:], [ROWS[0], *ROWS[2:]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "row 0: there is no image, expected its bytes"),
        (b"", "row 0: there is no image, expected its bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "row 0: the image starts with b'%!PS-Ado', expected a JPEG or PNG"),
        (IMAGES["11"][:100], f"{NAMES['11']} has no readable image header"),
        (b"\xff\xd8\xff" + bytes(9), f"{NAMES['11']} has no readable image header"),
        (encode("red", (20, 10)), "row 2: the box [20, 3.25, 40, 20] is not within the "),
    ],
)
def test_lmms_image_problems(tmp_path, content, message):
    write_lmms(tmp_path, image={"bytes": content, "path": "/etc/passwd"})
    for streaming in (False, True):
        with pytest.raises(ValueError, match=re.escape(message)):
            list(load(tmp_path, streaming=streaming))
    assert rows(load(tmp_path, errors="skip")) == ROWS[3:]  # no object of that image is left


def test_lmms_no_image_struct(tmp_path):
    write_lmms(tmp_path, image=None)
    assert rows(load(tmp_path, errors="skip")) == ROWS[3:]


def test_lmms_huge_images(tmp_path, monkeypatch):
    write_lmms(tmp_path)
    monkeypatch.setattr(parquet_files, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(ValueError, match=r"row 0: the image has \d+ bytes, expected at most 100"):
        load(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(hub_parquet, "MAX_IMAGES_GROWTH", 0)
    with pytest.raises(ValueError, match=r"row 0: the images up to here have \d+ bytes, expected at most 0 "):
        load(tmp_path, errors="skip")


def test_lmms_image_of_another_type(tmp_path):
    table = pa.Table.from_pylist([lmms_row(*OBJECTS[0])], LMMS_SCHEMA)
    pq.write_table(table.set_column(1, "image", pa.array([b"\xff\xd8\xff"])), tmp_path / "val.parquet")
    with pytest.raises(ValueError, match=r"val\.parquet has the type binary of images, expected bytes and path"):
        load(tmp_path)


def test_other_columns(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "val.parquet")
    with pytest.raises(
        ValueError, match=r"val\.parquet has the columns image, text, expected those of lmms-lab \(que"
    ):
        load(tmp_path)
    (tmp_path / "val.parquet").unlink()
    write_lmms(tmp_path, "val-00000-of-00002.parquet")
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "val-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"val-00001-of-00002\.parquet has no column question_id"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("write", "column"),
    [(write_lmms, column) for column in ("bbox", "file_name", "answer")]
    + [(write_jxu, column) for column in ("bbox", "file_name", "split", "sentences", "raw_anns", "raw_image_info")],
)
@pytest.mark.parametrize("value", ["text", 7, [7], {"a": 1}, b"\xff"])
def test_other_types_of_columns(tmp_path, write, column, value):
    path = write(tmp_path, "val.parquet") / "val.parquet"
    table = pq.read_table(path)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.array([value] * 3)), path)
    with pytest.raises(ValueError, match=rf"val\.parquet, row 0: .*({column}|the expression is 7)"):
        load(tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_broken_files(tmp_path, write):
    path = write(tmp_path, "val.parquet") / "val.parquet"
    content = path.read_bytes()
    for broken in (b"", b"PAR1", content[: len(content) // 2], b"x" * 100 + b"PAR1"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"val\.parquet is not a readable parquet file"):
            load(tmp_path)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:4] + bytes(footer - 4) + content[footer:])
    with pytest.raises(ValueError, match=r"val\.parquet cannot be read from row 0"):
        load(tmp_path)


def test_broken_images(tmp_path):
    path = (
        write_lmms(tmp_path, "val.parquet", changed=2, file_name="COCO_train2014_000000000033_2.jpg") / "val.parquet"
    )
    images = pq.read_metadata(path).row_group(1).column(1)
    assert images.path_in_schema == "image.bytes"
    content = bytearray(path.read_bytes())
    content[images.dictionary_page_offset : images.dictionary_page_offset + 100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"val\.parquet: the images from row 2 cannot be read"):
        load(tmp_path)


def test_text_that_is_not_utf_8(tmp_path):
    path = write_lmms(tmp_path, "val.parquet") / "val.parquet"
    path.write_bytes(path.read_bytes().replace(b"Red box", b"Red b\xffx"))
    with pytest.raises(ValueError, match=r"val\.parquet cannot be read from row 0: .*utf-8"):
        load(tmp_path)
