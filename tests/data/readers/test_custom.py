"""Tests of your own data in files: ten rows on three small images, in every format that is read."""

import csv
import itertools
import json
import logging
import os
import pickle
import re
from pathlib import Path

import pytest
from datasets import Value
from PIL import Image

from epmvg_hf import load_grounding_dataset
from epmvg_hf.data.builder import GroundingBuilder, open_source
from epmvg_hf.data.readers import custom, custom_files
from epmvg_hf.data.readers.custom import CustomData
from tests.fixtures.own_rows import GROUPED, PLACED, ROWS, SIZES, in_format, write_images

FOUR = {"xyxy": ["xmin", "ymin", "xmax", "ymax"], "xywh": ["x", "y", "width", "height"]}


def write_jsonl(folder: Path, rows=ROWS, box_format="xyxy", names=("image", "expression", "box")) -> Path:
    lines = [dict(zip(names, (*row[:2], in_format(row[2], box_format)), strict=True)) for row in rows]
    return write_lines(folder, *lines)


def write_lines(folder: Path, *lines) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "train.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def write_csv(folder: Path, box_format="xyxy", one_column: str | None = None, encoding="utf-8-sig") -> Path:
    with (folder / "train.csv").open("w", newline="", encoding=encoding) as file:
        table = csv.writer(file)
        table.writerow(["image", "expression", *([one_column] if one_column else FOUR[box_format])])
        for image, expression, box in ROWS:
            box = in_format(box, box_format)
            table.writerow([image, expression, *([str(box)] if one_column else box)])
    return folder


def coco() -> dict:
    ids = {name: number for number, name in enumerate(SIZES, start=7)}
    return {
        "images": [{"id": ids[n], "file_name": n, "width": w, "height": h} for n, (w, h) in SIZES.items()],
        "annotations": [
            {"id": number, "image_id": ids[image], "bbox": in_format(box, "xywh"), "caption": expression}
            for number, (image, expression, box) in enumerate(ROWS, start=100)
        ],
    }


def write_coco(folder: Path, content: dict | None = None) -> Path:
    (folder / "train.json").write_text(json.dumps(content or coco()), encoding="utf-8")
    return folder


def load(data_dir, split="train", box_format="xyxy", columns=None, image_dir=None, missing_images="error", **options):
    source = CustomData(Path(data_dir), split, image_dir, box_format, columns)
    return open_source(source, missing_images, **options)


def found(dataset) -> list[tuple]:
    return [(row["image_id"], row["expression"], row["box"]) for row in dataset]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "data")


# Formats


@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder, box_format: write_jsonl(folder, box_format=box_format),
        lambda folder, box_format: write_csv(folder, box_format),
        lambda folder, box_format: write_csv(folder, box_format, one_column="box", encoding="utf-8"),
    ],
)
def test_rows(folder, write, box_format):
    dataset = load(write(folder, box_format), box_format=box_format)
    assert found(dataset) == GROUPED
    assert [row["image"].size for row in dataset] == [SIZES[row[0]] for row in GROUPED]
    header = 1 + bool(list(folder.glob("*.csv")))
    assert dataset["source_row"][:] == [str(PLACED.index(row) + header) for row in GROUPED]


def test_coco(folder):
    dataset = load(write_coco(folder), box_format=None)
    assert found(dataset) == GROUPED
    assert dataset["source_row"][:] == [str(PLACED.index(row) + 100) for row in GROUPED]
    assert found(load(folder, box_format="xywh")) == GROUPED


def test_coco_scales_boxes_to_the_file(folder):
    content = coco()
    content["images"][1] |= {"width": 60, "height": 60}
    half = [[value / 2 for value in box] for image, _, box in ROWS if image == "more/b.jpg"]
    assert load(write_coco(folder, content), box_format=None)["box"][4:7] == half
    del content["images"][1]["width"], content["images"][1]["height"]
    assert found(load(write_coco(folder, content), box_format=None)) == GROUPED


def test_several_expressions_of_one_box(folder):
    write_lines(folder, {"image": "a.png", "expression": ["a dog", "the dog"], "box": [1, 2, 3, 4]})
    assert found(load(folder)) == [("a.png", "a dog", [1, 2, 3, 4]), ("a.png", "the dog", [1, 2, 3, 4])]
    content = coco()
    content["annotations"] = [{"id": 1, "image_id": 7, "bbox": [1, 2, 2, 2], "captions": ["a dog", "the dog"]}]
    (folder / "train.jsonl").unlink()
    assert found(load(write_coco(folder, content), box_format=None))[1] == ("a.png", "the dog", [1, 2, 3, 4])


def test_columns_of_other_names(folder):
    names = {"image": "file", "expression": "text", "box": "bbox"}
    write_jsonl(folder, names=names.values())
    assert found(load(folder, columns=names)) == GROUPED
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_text("image, expression, x1, y1, x2, y2\n\na.png, a dog, 1, 2, 3.5, 4\n")
    columns = {"xmin": "x1", "ymin": "y1", "xmax": "x2", "ymax": "y2"}
    assert found(load(folder, columns=columns)) == [("a.png", "a dog", [1, 2, 3.5, 4])]


@pytest.mark.parametrize("cell", ["[1, 2, 3.5, 4]", "1 2 3.5 4", "(1,2,3.5,4)", " 1,2, 3.5  ,4 "])
def test_box_in_one_cell(folder, cell):
    (folder / "train.csv").write_text(f'image,expression,box,more\na.png,"a\ndog","{cell}",1\na.png,a star,1 2 3 4,\n')
    dataset = load(folder)
    assert found(dataset) == [("a.png", "a\ndog", [1, 2, 3.5, 4]), ("a.png", "a star", [1, 2, 3, 4])]
    assert dataset["source_row"][:] == ["2", "4"]


def test_other_fields_and_blank_lines(folder):
    line = {"image": "./a.png", "expression": "a dog", "box": [1, 2, 3, 4], "image_id": 3, "score": {"a": None}}
    other = {"image": "a.png", "expression": "a star", "box": [1, 2, 3, 4]}
    windows = {"image": "more\\b.jpg", "expression": "a star", "box": [1, 2, 3, 4]}
    write_lines(folder, "\ufeff", line, "  ", windows, other)
    dataset = load(folder)
    assert dataset["image_id"][:] == ["a.png", "a.png", "more/b.jpg"]
    assert dataset["source_row"][:] == ["2", "5", "4"]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_box(folder, streaming):
    write_lines(
        folder,
        {"image": "a.png", "expression": "a dog", "box": None},
        {"image": "a.png", "expression": "the dog", "box": [1, 2, 3, 4]},
        {"image": "c.png", "expression": "a star", "box": [float("nan")] * 4},
    )
    expected = [("a.png", "a dog", None), ("a.png", "the dog", [1, 2, 3, 4]), ("c.png", "a star", None)]
    assert found(load(folder, streaming=streaming)) == expected
    (folder / "train.jsonl").unlink()
    for cells in (",,,", "nan,nan,nan,nan"):
        (folder / "train.csv").write_text(f"image,expression,x,y,width,height\na.png,a dog,{cells}\n")
        assert found(load(folder, box_format="xywh", streaming=streaming)) == expected[:1]


ZEBRA = {"image": "a.png", "expression": ["the zebra", "a zebra"], "box": None, "absent": True}
DOG = {"image": "a.png", "expression": "a dog", "box": [1, 2, 3, 4]}
WITH_ZEBRAS = [
    ("a dog", [1, 2, 3, 4], False),
    ("the zebra", None, True),
    ("a zebra", None, True),
    ("a caption", None, False),
]


def write_absent_csv(folder: Path, box_cells="1 2 3 4") -> Path:
    lines = [
        "image,expression,box,absent",
        f"a.png,a dog,{box_cells},",
        "a.png,the zebra,,True",
        "a.png,a zebra,,true",
    ]
    (folder / "train.csv").write_text("\n".join([*lines, "a.png,a caption,, false "]))
    return folder


def write_absent_coco(folder: Path) -> Path:
    content = coco()
    content["annotations"] = [
        {"id": 1, "image_id": 7, "bbox": [1, 2, 2, 2], "caption": "a dog"},
        {"id": 2, "image_id": 7, "bbox": None, "captions": ["the zebra", "a zebra"], "absent": True},
        {"id": 3, "image_id": 7, "bbox": None, "caption": "a caption", "absent": False},
    ]
    return write_coco(folder, content)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_lines(
            folder, DOG, ZEBRA, {**DOG, "expression": "a caption", "box": None, "absent": None}
        ),
        write_absent_csv,
        write_absent_coco,
    ],
)
def test_absent_expressions(folder, write, streaming):
    box_format = "xywh" if write is write_absent_coco else "xyxy"
    dataset = load(write(folder), box_format=box_format, streaming=streaming)
    assert dataset.features["absent"] == Value("bool")
    assert [(row["expression"], row["box"], row["absent"]) for row in dataset] == WITH_ZEBRAS


def test_absent_expressions_in_several_processes_and_a_file_that_gains_them(folder, tmp_path):
    options = {"num_proc": 2, "cache_dir": str(tmp_path / "cache")}
    images = [{**DOG, "image": name} for name in ("more/b.jpg", "c.png")]
    assert "absent" not in load(write_lines(folder, DOG, *images), **options).column_names
    dataset = load(write_lines(folder, DOG, *images, ZEBRA), **options)
    assert dataset["absent"][:] == [False, True, True, False, False]


def test_absent_expressions_in_a_field_of_another_name(folder):
    lines = [DOG, {**ZEBRA, "gone": True, "absent": "unused"}]
    assert load(write_lines(folder, *lines), columns={"absent": "gone"})["absent"][:] == [False, True, True]
    with pytest.raises(ValueError, match=r"train\.jsonl: no row says true or false in 'away', named for absent\."):
        load(folder, columns={"absent": "away"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**ZEBRA, "box": [1, 2, 3, 4]}, "absent is true, so the box must be None, but it is [1, 2, 3, 4]."),
        ({**ZEBRA, "absent": "true"}, "absent is 'true', expected true or false."),
        ({**ZEBRA, "absent": 1}, "absent is 1, expected true or false."),
        ({**ZEBRA, "expression": " "}, "the expression is ' ', expected words."),
    ],
)
def test_bad_absent_expressions(folder, line, message):
    write_lines(folder, DOG, line)
    with pytest.raises(ValueError, match=re.escape(f"train.jsonl, line 2: {message}")):
        load(folder)
    assert found(load(folder, errors="skip")) == [("a.png", "a dog", [1, 2, 3, 4])]


def test_absent_in_a_csv_is_true_false_or_nothing(folder):
    write_absent_csv(folder)
    text = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(text.replace("true", "1"))
    with pytest.raises(ValueError, match=r"train\.csv, line 4: absent is '1', expected true or false\."):
        load(folder)


def test_captions_of_coco(folder, caplog):
    content = coco()
    for annotation in content["annotations"]:
        del annotation["bbox"]
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.readers.coco_files"):
        dataset = load(write_coco(folder, content), box_format=None)
    assert found(dataset) == [(*row[:2], None) for row in GROUPED]
    assert "train.json: no annotation has a bbox" in caplog.text
    for annotation, bbox in zip(content["annotations"], itertools.cycle([None, [float("nan")] * 4]), strict=False):
        annotation["bbox"] = bbox
    assert found(load(write_coco(folder, content), box_format=None)) == [(*row[:2], None) for row in GROUPED]


def test_image_folder(folder, tmp_path):
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows")
    assert found(load(tmp_path / "rows", image_dir=folder)) == GROUPED
    with pytest.raises(FileNotFoundError, match=f"3 of 3 images.*looked in {tmp_path / 'rows'};"):
        load(tmp_path / "rows")


def test_load_grounding_dataset(folder, tmp_path):
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows", box_format="xywh", names=("image", "text", "box"))
    options = {"box_format": "xywh", "columns": {"expression": "text"}, "image_dir": str(folder)}
    dataset = load_grounding_dataset("custom", tmp_path / "rows", exclude=["c.png"], **options)
    assert found(dataset) == [row for row in GROUPED if row[0] != "c.png"]


def test_turned_photo(folder):
    """Boxes are for the photo as displayed: stored as 40 x 20, it is decoded as 20 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGB", (40, 20), "white")
    stored.paste("red", (0, 0, 10, 5))  # its upper left corner is displayed at the upper right
    stored.save(folder / "turned.jpg", exif=exif, quality=95, subsampling=0)
    write_lines(folder, {"image": "turned.jpg", "expression": "the red", "box": [15, 0, 20, 10]})
    row = load(folder)[0]
    assert row["image"].size == (20, 40) and row["box"] == [15, 0, 20, 10]
    red, _, blue = row["image"].crop(row["box"]).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert red > 230 and blue < 50
    write_lines(folder, {"image": "turned.jpg", "expression": "the red", "box": [15, 0, 40, 10]})
    with pytest.raises(ValueError, match=r"box \[15, 0, 40, 10\] is not within the 20 x 40 pixels of turned\.jpg"):
        load(folder)
    content = {"images": [{"id": 1, "file_name": "turned.jpg", "width": 40, "height": 20}]}
    content["annotations"] = [{"id": 5, "image_id": 1, "bbox": [0, 0, 10, 5], "caption": "the red"}]
    (folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"annotation 5: .* has 20 x 40 pixels, expected 40 x 20, not turned"):
        load(write_coco(folder, content), box_format=None)


# Splits


def test_split_names(folder):
    write_jsonl(folder)
    (folder / "train.jsonl").rename(folder / "val.jsonl")
    for name in ("val", "validation"):
        assert str(load(folder, name).split) == "validation"
    (folder / "val.jsonl").rename(folder / "validation.jsonl")
    assert found(load(folder, "val")) == GROUPED
    for name in ("train-2014", "my_split.v2", "Test"):
        (folder / f"{name}.jsonl").write_bytes((folder / "validation.jsonl").read_bytes())
        dataset = load(folder, name)
        assert str(dataset.split) == name.replace("-", "_") and found(dataset) == GROUPED
    with pytest.raises(
        FileNotFoundError,
        match=r"no dev\.jsonl, dev\.csv or dev\.json in .*data; there are the splits Test, my_split\.v2, train-2014",
    ):
        load(folder, "dev")


def test_one_file_per_split(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl, .*; nor any other such file"):
        load(folder)
    write_csv(write_jsonl(folder))
    with pytest.raises(ValueError, match=r"has train\.jsonl and train\.csv, expected one file for the split train"):
        load(folder)
    (folder / "val.jsonl").write_text("")
    (folder / "validation.csv").write_text("")
    with pytest.raises(ValueError, match=r"has val\.jsonl and validation\.csv, expected one file"):
        load(folder, "val")


@pytest.mark.parametrize(
    "split", ["", ".", "..", "../train", "/etc/passwd", "a/b", "a\\b", ".train", "train\n", "a b"]
)
def test_split_is_a_plain_name(folder, split):
    with pytest.raises(ValueError, match="split must be a name of letters, digits"):
        load(write_jsonl(folder), split)


def test_split_all(folder):
    with pytest.raises(ValueError, match='split name "all" for every split'):
        load(write_jsonl(folder), "all")


# Same rows however they are read, and caches that notice changes


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_coco])
def test_streaming_and_processes_give_equal_rows(folder, tmp_path, write):
    box_format = None if write is write_coco else "xyxy"
    expected = list(load(write(folder), box_format=box_format).remove_columns("image"))
    streamed = load(folder, box_format=box_format, streaming=True)
    assert streamed.num_shards == 3
    assert [{k: v for k, v in row.items() if k != "image"} for row in streamed] == expected
    assert [row["image"].size for row in streamed] == [SIZES[row[0]] for row in GROUPED]
    parallel = load(folder, box_format=box_format, num_proc=2, cache_dir=str(tmp_path / "other"))
    assert list(parallel.remove_columns("image")) == expected


def test_file_is_read_once_and_not_sent_to_processes(folder, monkeypatch):
    opened = []
    read = custom_files.read_lines
    monkeypatch.setattr(custom_files, "read_lines", lambda *args: opened.append(1) or read(*args))
    assert len(list(load(write_jsonl(folder), streaming=True))) == 10
    assert len(opened) == 1
    source = CustomData(folder, "train", None, "xyxy")
    source.fingerprint()
    assert len(pickle.loads(pickle.dumps(source)).list_images()[0]) == 3 and len(pickle.dumps(source)) < 2000


def test_changes_are_seen(folder):
    assert load(write_jsonl(folder))["expression"][0] == "the red circle"
    write_jsonl(folder, [(image, text.replace("red", "blue"), box) for image, text, box in ROWS])
    assert load(folder)["expression"][0] == "the blue circle"
    Image.new("RGB", (39, 20)).save(folder / "a.png")
    assert load(folder)["box"][1] == [20, 4, 39, 20]
    write_jsonl(folder, [(image, text, in_format(box, "xywh")) for image, text, box in ROWS[:1]])
    assert load(folder, box_format="xywh")["box"][:] == load(folder, box_format="xyxy")["box"][:]
    write_jsonl(folder, [("a.png", "a dog", [1, 2, 3, 4])])
    assert load(folder, box_format="xywh")["box"][:] == [[1, 2, 4, 6]]
    assert load(folder, box_format="xyxy")["box"][:] == [[1, 2, 3, 4]]


def test_unchanged_data_is_prepared_once(folder, monkeypatch):
    expected = found(load(write_jsonl(folder)))
    monkeypatch.setattr(GroundingBuilder, "_generate_tables", None)
    assert found(load(folder)) == expected


def test_two_folders_do_not_share_a_cache(tmp_path):
    one, two = (write_jsonl(write_images(tmp_path / name)) for name in ("one", "two"))
    Image.new("RGB", (40, 20), "blue").save(two / "a.png")
    for path in (path for root in (one, two) for path in root.rglob("*.*")):
        os.utime(path, ns=(0, 0))
    assert load(one)[0]["image"].getpixel((0, 0)) == (255, 255, 255)
    assert load(two)[0]["image"].getpixel((0, 0)) == (0, 0, 255)


# Files that are not what they should be

GOOD = {"image": "a.png", "expression": "a dog", "box": [1, 2, 3, 4]}


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


BAD_LINES = [
    ("{", "not valid JSON (Expecting property name enclosed in double quotes at character 2)"),
    ("[" * 100_000, "not usable JSON ("),
    ('{"box": ' + "1" * 5000 + "}", "not usable JSON ("),
    ("[1]", "not a JSON object but [1]"),
    ("\x00", "it has a NUL byte, expected text in UTF-8"),
    (without("image"), "no 'image', only expression, box"),
    (without("expression"), "no 'expression', only image, box"),
    (without("box"), "no 'box', only image, expression"),
    (without("box") | {"bbox": [1, 2, 3, 4]}, "no 'box', only image, expression, bbox"),
    (GOOD | {"image": None}, "the image is None, expected a path"),
    (GOOD | {"image": 3}, "the image is 3, expected a path"),
    (GOOD | {"image": " "}, "the image is ' ', expected a path"),
    (GOOD | {"image": "../a.png"}, "the image '../a.png' is not a path within"),
    (GOOD | {"image": "more/../../a.png"}, "is not a path within"),
    (GOOD | {"image": "/etc/passwd"}, "the image '/etc/passwd' is not a path within"),
    (GOOD | {"image": "..\\a.png"}, "is not a path within"),
    (GOOD | {"image": "a\0.png"}, "is not a path within"),
    (GOOD | {"image": "a" * 5000}, "cannot be looked for: File name too long"),
    (GOOD | {"expression": ""}, "the expression is '', expected words"),
    (GOOD | {"expression": " \n"}, "the expression is ' \\n', expected words"),
    (GOOD | {"expression": None}, "the expression is None, expected words"),
    (GOOD | {"expression": []}, "the expression is [], expected words or a list of such texts"),
    (GOOD | {"expression": ["", 3]}, "the expression is '', expected words"),
    (GOOD | {"expression": "\ud83d dog"}, "the expression is '\\ud83d dog', expected words"),
    (GOOD | {"image": "\ud83d.png"}, "the image is '\\ud83d.png', which has half of a character"),
    (GOOD | {"box": 3}, "the box is 3, expected 4 finite numbers"),
    (GOOD | {"box": [1, 2, 3]}, "the box is [1, 2, 3], expected 4 finite numbers"),
    (GOOD | {"box": [1, 2, 3, "4"]}, "the box is [1, 2, 3, '4'], expected 4 finite numbers"),
    (GOOD | {"box": [1, 2, 3, True]}, "the box is [1, 2, 3, True], expected 4 finite numbers"),
    (GOOD | {"box": [1, 2, 3, float("nan")]}, "the box is [1, 2, 3, nan], expected 4 finite numbers"),
    (GOOD | {"box": [1, 2, 3, 10**400]}, "expected 4 finite numbers"),
    (GOOD | {"box": [[1, 2, 3, 4]]}, "the box is [[1, 2, 3, 4]], expected 4 finite numbers"),
    (GOOD | {"box": [3, 2, 3, 4]}, "the box [3, 2, 3, 4] is empty or inverted"),
    (GOOD | {"box": [-2, 2, 3, 4]}, "the box [-2, 2, 3, 4] starts outside the image"),
    (GOOD | {"box": [1, 2, 42, 4]}, "the box [1, 2, 42, 4] is not within the 40 x 20 pixels of a.png"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line(folder, line, message, caplog):
    """It is named, and `errors="skip"` passes over it alone."""
    other = GOOD | {"image": "c.png"}
    write_lines(folder, GOOD | {"image": "more/b.jpg"}, line, other)
    pattern = re.escape(f"{folder}/train.jsonl, line 2: ") + ".*" + re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        load(folder)
    with pytest.raises(ValueError, match=pattern):
        list(load(folder, streaming=True))
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.builder"):
        dataset = load(folder, errors="skip")
    assert dataset["source_row"][:] == ["1", "3"]
    assert re.search(f"left out: {pattern}", caplog.text)


def test_xywh_without_extent(folder):
    write_lines(folder, GOOD | {"box": [1, 2, 0, 4]})
    with pytest.raises(ValueError, match=r"line 1: the box \[1\.0, 2\.0, 0\.0, 4\.0\] is empty, expected x, y, width"):
        load(folder, box_format="xywh")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv is empty, expected a header and rows"),
        ("\n \n", "train.csv is empty, expected a header and rows"),
        ("image;expression;box\n", "train.csv has the header 'image;expression;box', expected names between commas"),
        ("image\texpression\tbox\n", r"has the header 'image\texpression\tbox', expected names between commas"),
        (
            '"image,expression,box\na.png,a dog,1 2 3 4\n',
            "train.csv, lines 1 to 2: not valid CSV (unexpected end of data",
        ),
        (
            'image,"expression,box\na.png,"a dog",1 2 3 4\n',
            "train.csv, lines 1 to 2: not valid CSV (',' expected after",
        ),
        ('image,"expression"s,box\na.png,a dog,1 2 3 4\n', "train.csv, line 1: not valid CSV (',' expected after"),
        (
            'image,expression,"box\na.png,a dog,"\n',
            "has the column 'box\\na.png,a dog,', expected a name in UTF-8 without line breaks",
        ),
        ("image,expression,xmin,ymin,xmax\n", "expected image, expression and either box or xmin, ymin, xmax, ymax"),
        ("image,expression,x,y,width,height\n", "and either box or xmin, ymin, xmax, ymax"),
        ("image,expression,image,box\n", "of which 'image' comes twice"),
        ("image,expression,box,,\n", "of which '' comes twice"),
        ("image,expression,box\na.png,a dog\n", "line 2: 2 cells, expected 3 as in the header"),
        ("image,expression,box\na.png,a dog,1,2,3,4\n", "line 2: 6 cells, expected 3"),
        ("image,expression,box\na.png,a dog,1 2 3\n", "line 2: the box is [1.0, 2.0, 3.0], expected 4 finite"),
        ("image,expression,box\na.png,a dog,1 2 3 x\n", "line 2: 'x' in the box is no number"),
        ("image,expression,box\na.png,a dog,[]\n", "line 2: the box is [], expected 4 finite numbers"),
        ("image,expression,box\na.png,a dog,1 2 3 nan\n", "line 2: the box is [1.0, 2.0, 3.0, nan]"),
        ("image,expression,box\n,a dog,1 2 3 4\n", "line 2: the image is '', expected a path"),
        ("image,expression,box\na.png,,1 2 3 4\n", "line 2: the expression is '', expected words"),
        ("image,expression,xmin,ymin,xmax,ymax\na.png,a,1,,3,4\n", "line 2: the box is [1.0, None, 3.0, 4.0]"),
        ('image,expression,box\na.png,"a" dog,1 2 3 4\n', "line 2: not valid CSV (',' expected after '\"')"),
        ('image,expression,box\na.png,"a dog,1 2 3 4\n', "line 2: not valid CSV (unexpected end of data"),
        (
            'image,expression,box\na.png,"a dog,1 2 3 4\na.png,a dog,1 2 3 4\na.png,"a dog",1 2 3 4\n',
            "lines 2 to 4: not valid CSV (',' expected after '\"'); look at the quotes in line 2.",
        ),
    ],
)
def test_bad_csv(folder, text, message):
    (folder / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def test_bad_csv_row_is_skipped(folder):
    good = "a.png,a dog,1 2 3 4\n"
    (folder / "train.csv").write_text(f'image,expression,box\n{good}a.png,"a" dog,1 2 3 4\na.png\n{good}')
    assert load(folder, errors="skip")["source_row"][:] == ["2", "5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "train.json has no list of images"),
        (lambda c: c.update(annotations={}), "train.json has no list of annotations"),
        (lambda c: c["images"].insert(1, 5), "train.json, images[1]: 5 is not an object"),
        (lambda c: c["images"][1].pop("id"), "train.json, images[1]: no 'id', only file_name, width, height"),
        (lambda c: c["images"][1].update(id=7.5), "images[1]: the id is 7.5, expected a number or text"),
        (lambda c: c["images"][1].update(id=7), "image 7: an image before it has the same id"),
        (lambda c: c["images"][1].pop("file_name"), "image 8: no 'file_name', only id, width, height"),
        (lambda c: c["images"][1].update(file_name="a.png"), "image 8: an image before it has the same file_name"),
        (lambda c: c["images"][1].update(width=0), "annotation 101: the size of more/b.jpg is (0, 30), expected"),
        (lambda c: c["images"][1].pop("width"), "annotation 101: the size of more/b.jpg is (None, 30), expec"),
        (lambda c: c["images"][1].update(file_name="../b.jpg"), "annotation 101: the image '../b.jpg' is not a path"),
        (lambda c: c["annotations"].insert(1, 5), "train.json, annotations[1]: 5 is not an object"),
        (lambda c: c["annotations"][1].pop("id"), "annotations[1]: no 'id'"),
        (lambda c: c["annotations"][1].update(id=100), "annotation 100: an annotation before it has the same id"),
        (lambda c: c["annotations"][1].pop("image_id"), "annotation 101: no 'image_id'"),
        (lambda c: c["annotations"][1].update(image_id="8"), "101: its image_id '8' is not among the images"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotation 101: no 'bbox', only id, image_id, caption"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "annotation 101: the box is [1, 2, 3], expected 4"),
        (
            lambda c: c["annotations"][1].pop("caption"),
            "annotation 101: it has no expression, expected one of caption",
        ),
        (lambda c: c["annotations"][1].update(expressions=["a"]), "annotation 101: it has caption and expressions"),
        (lambda c: c["annotations"][1].update(caption=3), "annotation 101: the expression is 3, expected words"),
    ],
)
def test_bad_coco(folder, change, message):
    content = coco()
    change(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(write_coco(folder, content), box_format=None)


def test_bad_coco_image_is_skipped_with_its_annotations(folder, caplog):
    content = coco()
    del content["images"][1]["file_name"]
    with caplog.at_level(logging.WARNING, logger="epmvg_hf.data.builder"):
        dataset = load(write_coco(folder, content), box_format=None, errors="skip")
    assert found(dataset) == [row for row in GROUPED if row[0] != "more/b.jpg"]
    assert caplog.text.count("left out") == 1


@pytest.mark.parametrize("text", ["", "[]", '{"images": []', '{"image": "a.png"}\n{"image": "a.png"}'])
def test_json_that_is_not_coco(folder, text):
    (folder / "train.json").write_text(text)
    with pytest.raises(ValueError, match=r"train\.json: .*Rows, one object per line, go in a file \.jsonl"):
        load(folder, box_format=None)


@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
def test_normalised_boxes(folder, box_format):
    rows = [(image, text, [v / SIZES[image][i % 2] for i, v in enumerate(box)]) for image, text, box in PLACED]
    with pytest.raises(ValueError, match=r"train\.jsonl: every box lies within \[0, 1\], .* normalised .* pixels"):
        load(write_jsonl(folder, rows, box_format), box_format=box_format)


def test_small_boxes_may_be_meant(folder):
    Image.new("RGB", (3, 2)).save(folder / "a.png")
    write_lines(folder, GOOD | {"box": [0, 0, 1, 1]})
    assert load(folder)["box"][:] == [[0, 0, 1, 1]]
    write_lines(folder, GOOD | {"box": [0, 0, 1, 1]}, GOOD | {"box": [0, 0, 2, 1]})
    assert len(load(folder)) == 2


def test_limits(folder, monkeypatch):
    write_lines(folder, GOOD, GOOD | {"expression": "a" * 2**20})
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: the line is longer than 1,048,576 bytes"):
        load(folder)
    monkeypatch.setattr(custom, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match=r"train\.jsonl has 1,048,.* bytes, expected at most 100; as_grounding_data"):
        load(folder)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\r\r\n", "\n"])
@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_ends_of_lines(folder, write, end):
    write(folder)
    (file,) = folder.glob("train.*")
    file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", end.encode()))
    assert found(load(folder)) == GROUPED


@pytest.mark.parametrize("end", ["\r", "\n"])
def test_lines_of_any_end_are_counted(folder, end):
    text = end.join(["image,expression,box", 'a.png,"a', 'dog",1 2 3 4', "a.png,a star,1 2 3 4", ""])
    (folder / "train.csv").write_bytes(text.encode())
    dataset = load(folder)
    assert dataset["expression"][:] == [f"a{end}dog", "a star"] and dataset["source_row"][:] == ["2", "4"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n".encode("utf-16"), ", line 1: not UTF-8 but UTF-16, as its first two bytes say."),
        ("a\n".encode("utf-16-be"), "(, line 1: it has a NUL byte| has the column '.x00a.*), expected .* in UTF-8"),
        (b"\n\ncaf\xe9\n", ", line 3: not UTF-8 .invalid continuation byte at byte 3.[.]"),
        (b"\n\n" + b" " * 20_000 + b"\n\xe9\xb4", ", line 4: not UTF-8 .unexpected end of data at byte 0.[.]"),
    ],
)
def test_what_is_not_utf8_is_named(folder, suffix, content, message):
    (folder / f"train.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train\.{suffix}{message}"):
        load(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_text_is_utf8(folder, suffix):
    (folder / f"train.{suffix}").write_bytes(b'image,expression,box\n{"images": "caf\xe9"')
    with pytest.raises(ValueError, match=rf"train\.{suffix}.*(not UTF-8 \(|codec can't decode|not valid JSON)"):
        load(folder, box_format=None if suffix == "json" else "xyxy")


@pytest.mark.parametrize(
    ("write", "arguments", "message"),
    [
        (
            write_jsonl,
            {"box_format": None},
            r"box_format is needed for .*train\.jsonl: \"xyxy\" or \"xywh\"\. .* nothi",
        ),
        (write_csv, {"box_format": None}, r"box_format is needed for .*train\.csv"),
        (write_jsonl, {"box_format": "cxcywh"}, 'box_format must be "xyxy" or "xywh", not \'cxcywh\''),
        (write_coco, {"box_format": "xyxy"}, r'box_format must be "xywh" or left out for .*train\.json'),
        (write_coco, {"box_format": None, "columns": {"box": "b"}}, r"columns does not apply to .*train\.json"),
        (
            write_jsonl,
            {"columns": {"bbox": "b"}},
            "columns may rename image, expression, box, absent, xmin, .*, not 'bbox'",
        ),
        (write_jsonl, {"columns": {"box": "bbox"}}, "line 1: no 'bbox', only image, expression, box"),
        (write_csv, {"columns": {"image": "file"}}, "has the columns image, .*, expected file, expression and either"),
    ],
)
def test_bad_arguments(folder, write, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(write(folder), **arguments)
