"""Tests of your own data as datasets of the library `datasets`: ten rows on three small images, in every form."""

import hashlib
import io
import json
import math
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from epmvg_hf import (
    EpmVGTrainer,
    EpmVGTrainingArguments,
    ImageGroups,
    as_grounding_dataset,
    load_grounding_dataset,
)
from tests.fixtures.models import tiny_model
from tests.fixtures.own_rows import PLACED, ROWS, SIZES, in_format, write_images


def found(dataset) -> list[tuple]:
    return [(row["image_id"], row["expression"], row["box"]) for row in dataset]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_images(tmp_path / "data")


def encoded(name: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZES[name], {"a.png": "red", "more/b.jpg": "green", "c.png": "blue"}[name]).save(buffer, "PNG")
    return buffer.getvalue()


def own_rows(box_format="xyxy", **more) -> list[dict]:
    """Rows of another make: the same file name for every image."""
    return [
        {"photo": {"bytes": encoded(image), "path": "0.png"}, "text": text, "bbox": in_format(box, box_format), **more}
        for image, text, box in ROWS
    ]


OWN = {"image": "photo", "expression": "text", "box": "bbox"}
IDS = {name: hashlib.sha256(encoded(name)).hexdigest()[:32] for name in SIZES}
CONVERTED = [(IDS[image], text, box) for image, text, box in PLACED]


def own_dataset(rows: list[dict] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows or own_rows()).cast_column("photo", datasets.Image())


def streamed_parquet(folder: Path, rows: list[dict] | None = None) -> datasets.IterableDataset:
    folder.mkdir(parents=True, exist_ok=True)
    own_dataset(rows).to_parquet(str(folder / "rows.parquet"))
    return datasets.load_dataset(
        "parquet", data_files={"train": str(folder / "rows.parquet")}, split="train", streaming=True
    )


def webdataset(folder: Path, samples: list[dict], streaming: bool = True):
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                entry = tarfile.TarInfo(f"{number:06}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    files = {"train": str(folder / "0.tar")}
    return datasets.load_dataset("webdataset", data_files=files, split="train", streaming=streaming)


WEB = {"image": "png", "expression": "json.expression", "box": "json.box"}


@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
@pytest.mark.parametrize("streaming", [False, True])
def test_own_dataset(tmp_path, box_format, streaming):
    rows = own_rows(box_format, extra=1)
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    result = as_grounding_dataset(dataset.with_format("torch"), OWN, box_format)
    assert isinstance(result, type(dataset))
    assert found(result) == CONVERTED
    assert [row["image"].size for row in result] == [SIZES[row[0]] for row in ROWS]
    assert result.column_names == ["image", "image_id", "expression", "box"]
    assert result.features["image"] == datasets.Image()
    assert result.features["box"] == datasets.List(datasets.Value("float32"), length=4)


def test_own_dataset_is_converted_once():
    result = as_grounding_dataset(own_dataset(), OWN)
    again = as_grounding_dataset(own_dataset(), OWN)
    assert again._fingerprint == result._fingerprint
    selected = as_grounding_dataset(own_dataset().select([3, 1, 1]), OWN)
    assert found(selected) == [CONVERTED[3], CONVERTED[1], CONVERTED[1]]
    assert selected[0]["image"].size == SIZES["c.png"]


@pytest.mark.parametrize("image_feature", ["bytes", "path", "decoded"])
@pytest.mark.parametrize("streaming", [False, True])
def test_forms_of_images(folder, image_feature, streaming):
    """Bytes, paths, and in an untyped stream whatever a generator gives."""
    path = str(folder / "a.png")
    value = {"bytes": encoded("a.png"), "path": path, "decoded": Image.open(io.BytesIO(encoded("a.png")))}
    rows = [{"image": value[image_feature], "expression": "a dog", "box": [1, 2, 3, 4]}]
    if streaming:
        dataset = datasets.IterableDataset.from_generator(lambda: iter(rows))
        assert dataset.features is None
    else:
        dataset = datasets.Dataset.from_list(rows)
    (row,) = as_grounding_dataset(dataset)
    assert row["image"].size == SIZES["a.png"]
    assert row["image_id"] == path if image_feature == "path" else len(row["image_id"]) == 32


def test_path_beside_bytes_is_not_read(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = [{"image": {"bytes": encoded("c.png"), "path": "a.png"}, "expression": "a dog", "box": [1, 2, 3, 4]}]
    (row,) = as_grounding_dataset(datasets.IterableDataset.from_generator(lambda: iter(rows)))
    assert row["image"].size == SIZES["c.png"] and row["image_id"] == IDS["c.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_image_ids_of_ones_own(tmp_path, streaming):
    rows = [{**row, "number": index // 2} for index, row in enumerate(own_rows())]
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    result = as_grounding_dataset(dataset, {**OWN, "image_id": "number"})
    assert [row["image_id"] for row in result] == [str(index // 2) for index in range(10)]
    named = as_grounding_dataset(dataset.rename_column("number", "image_id"), OWN)
    assert [row["image_id"] for row in named] == [str(index // 2) for index in range(10)]


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_expressions(tmp_path, streaming):
    photo = {"bytes": encoded("a.png"), "path": None}
    rows = [
        {"photo": photo, "text": ["a dog", "the dog"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]},
        {"photo": {"bytes": encoded("c.png"), "path": None}, "text": ["a star"], "bbox": [[2, 2, 9, 9]]},
    ]
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    result = as_grounding_dataset(dataset, OWN)
    a, c = IDS["a.png"], IDS["c.png"]
    assert found(result) == [(a, "a dog", [1, 2, 3, 4]), (a, "the dog", [5, 6, 7, 8]), (c, "a star", [2, 2, 9, 9])]
    assert [row["image"].size for row in result] == [(40, 20), (40, 20), (24, 48)]
    for row in rows:
        row["bbox"] = row["bbox"][0]
    dataset = streamed_parquet(tmp_path / "flat", rows) if streaming else own_dataset(rows)
    assert [row["box"] for row in as_grounding_dataset(dataset, OWN)] == [[1, 2, 3, 4], [1, 2, 3, 4], [2, 2, 9, 9]]


@pytest.mark.parametrize("box_format", ["xyxy", "xywh"])
@pytest.mark.parametrize("no_box", [None, [math.nan] * 4])
@pytest.mark.parametrize("streaming", [False, True])
def test_own_rows_without_box(tmp_path, streaming, no_box, box_format):
    rows = [{**row, "bbox": row["bbox"] if index % 2 else no_box} for index, row in enumerate(own_rows(box_format))]
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    expected = [row[2] if index % 2 else None for index, row in enumerate(PLACED)]
    assert [row["box"] for row in as_grounding_dataset(dataset, OWN, box_format)] == expected
    captions = as_grounding_dataset(dataset.remove_columns("bbox"), {**OWN, "box": None})
    assert [row["box"] for row in captions] == [None] * 10


def web_samples(number=float) -> list[dict]:
    return [
        {"png": encoded(image), "json": {"expression": text, "box": [number(value) for value in box]}}
        for image, text, box in ROWS
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(tmp_path, monkeypatch, streaming):
    monkeypatch.setitem(sys.modules, "webdataset", None)  # `datasets` reads such archives on its own
    result = as_grounding_dataset(webdataset(tmp_path, web_samples(), streaming), WEB)
    assert found(result) == CONVERTED
    assert [row["image"].size for row in result] == [SIZES[row[0]] for row in ROWS]


def test_streamed_boxes_are_not_cut_to_integers(tmp_path):
    """`datasets` takes the type of the boxes from the first five samples."""
    samples = web_samples(int)
    samples[7]["json"]["box"] = [1.5, 2.5, 3.5, 4.5]
    result = as_grounding_dataset(webdataset(tmp_path, samples), WEB)
    assert [row["box"] for row in result] == [sample["json"]["box"] for sample in samples]


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "custom"])
def test_streams_train(tmp_path, processor, kind):
    if kind == "parquet":
        stream = as_grounding_dataset(streamed_parquet(tmp_path), OWN)
    elif kind == "webdataset":
        stream = as_grounding_dataset(webdataset(tmp_path, web_samples()), WEB)
    else:
        lines = [json.dumps({"image": image, "expression": text, "box": box}) for image, text, box in ROWS]
        (write_images(tmp_path) / "train.jsonl").write_text("\n".join(lines))
        stream = load_grounding_dataset("custom", tmp_path, box_format="xyxy", streaming=True)
    trainer = EpmVGTrainer(
        model=tiny_model(box_head="map"),
        args=EpmVGTrainingArguments(
            str(tmp_path / "out"),
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=4,
            augment=False,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=stream,
        eval_dataset=stream,
        processing_class=processor,
    )
    assert trainer.train().global_step == 2
    assert 0 <= trainer.evaluate()["eval_mean_iou"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, r"row 1 \(0\.png\): the expression is ' ', expected words"),
        ({"text": None}, r"row 1 \(0\.png\): the expression is None, expected words"),
        ({"bbox": [1.0, 2.0, 3.0]}, r"row 1 \(0\.png\): the box is \[1\.0, 2\.0, 3\.0\], expected 4 finite numbers"),
        ({"bbox": [1.0, 2.0, 3.0, float("inf")]}, r"row 1 \(0\.png\): the box is .*, expected 4 finite numbers"),
        ({"bbox": [1.0, 2.0, 3.0, math.nan]}, r"row 1 \(0\.png\): the box is .*, expected 4 finite numbers"),
        ({"bbox": [math.nan] * 3}, r"row 1 \(0\.png\): the box is \[nan, nan, nan\], expected 4 finite numbers"),
        ({"bbox": [3.0, 2.0, 3.0, 4.0]}, r"row 1 \(0\.png\): the box \[3, 2, 3, 4\] is empty or inverted"),
        ({"bbox": [-2.0, 2.0, 3.0, 4.0]}, r"row 1 \(0\.png\): the box .* starts outside the image"),
        (
            {"bbox": [2.0, 2.0, 32.0, 4.0]},
            r"row 1 \(0\.png\): the box \[2, 2, 32, 4\] is not within the 30 x 30 pixels",
        ),
        ({"photo": None}, "row 1: there is no image"),
        ({"photo": {"bytes": b"no image", "path": None}}, "row 1: the image has no readable image header"),
        ({"photo": {"bytes": encoded("more/b.jpg")[:-40]}}, "row 1: the image cannot be decoded to its end"),
    ],
)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_own_row(tmp_path, change, message, streaming, with_ids):
    rows = own_rows(**({"image_id": "0"} if with_ids else {}))
    rows[1] |= change
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    with pytest.raises(ValueError, match=message):
        list(as_grounding_dataset(dataset, OWN))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_box_is_shown_as_its_user_wrote_it(tmp_path, streaming):
    rows = own_rows("xywh")
    rows[2]["bbox"] = [20.25, 4.0, 22.5, 16.0]
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    written = (
        r"row 2 \(0\.png\): the box \[20\.25, 4, 22\.5, 16\] \(x, y, width, height\) is not within the 40 x 20 pixels"
    )
    with pytest.raises(ValueError, match=written):
        list(as_grounding_dataset(dataset, OWN, "xywh"))


def test_a_transform_is_not_dropped():
    dataset = own_dataset().with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="call as_grounding_dataset first, and with_transform on what it returns"):
        as_grounding_dataset(dataset, OWN)


def test_image_files_that_cannot_be_measured_here_are_left_to_the_reader(folder):
    rows = [{"image": "https://example.org/a.png", "expression": "a dog", "box": [1.0, 2.0, 300.0, 4.0]}]
    dataset = as_grounding_dataset(datasets.Dataset.from_list(rows))
    assert dataset["box"][0] == [1, 2, 300, 4]


def test_bad_nested_row():
    rows = [{"image": encoded("a.png"), "json": {"expression": "a dog"}}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match=r"row 0: no 'json\.box'"):
        list(as_grounding_dataset(stream, {"expression": "json.expression", "box": "json.box"}))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        (3, "the image is 3, expected"),
    ],
)
def test_row_without_image(image, message):
    rows = [{"image": image, "expression": "a dog", "box": [1, 2, 3, 4]}]
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        list(as_grounding_dataset(datasets.IterableDataset.from_generator(lambda: iter(rows))))


def test_column_without_images():
    with pytest.raises(ValueError, match="the column 'number' is int64, expected images, their bytes or paths"):
        as_grounding_dataset(own_dataset().add_column("number", [3] * 10), {**OWN, "image": "number"})


def test_normalised_own_boxes():
    rows = [{**row, "bbox": [0.1, 0.2, 0.5, 1.0]} for row in own_rows()]
    with pytest.raises(ValueError, match=r"row 0 and those after it: every box lies within \[0, 1\], expected pixels"):
        as_grounding_dataset(own_dataset(rows), OWN)


def absent_rows(flags: list) -> list[dict]:
    """A row per flag, in a column of another name; those that are absent have no box."""
    rows = own_rows()[: len(flags)]
    return [row | {"gone": flag, "bbox": None if flag else row["bbox"]} for row, flag in zip(rows, flags, strict=True)]


@pytest.mark.parametrize("streaming", [False, True])
def test_absent_expressions(tmp_path, streaming):
    rows = absent_rows([False, True, None])
    dataset = streamed_parquet(tmp_path, rows) if streaming else own_dataset(rows)
    result = as_grounding_dataset(dataset, {**OWN, "absent": "gone"})
    assert result.features["absent"] == datasets.Value("bool")
    assert [(row["absent"], row["box"]) for row in result] == [
        (False, PLACED[0][2]),
        (True, None),
        (False, PLACED[2][2]),
    ]
    renamed = dataset.rename_column("gone", "absent")
    assert list(as_grounding_dataset(renamed, OWN)) == list(result)
    assert "absent" not in next(iter(as_grounding_dataset(renamed, {**OWN, "absent": None})))
    if not streaming:
        groups = ImageGroups(result)
        assert [group.boxes.tolist() for group in groups][1] == [[0, 0, 0, 0]]


def test_one_of_several_expressions_is_absent(tmp_path):
    sample = {"expression": ["a dog", "the zebra"], "box": [[1.5, 2.0, 3.0, 4.0], None], "absent": [False, True]}
    dataset = webdataset(tmp_path, [{"png": encoded("a.png"), "json": sample}])
    rows = list(as_grounding_dataset(dataset, {**WEB, "absent": "json.absent"}))
    assert [(row["expression"], row["box"], row["absent"]) for row in rows] == [
        ("a dog", [1.5, 2, 3, 4], False),
        ("the zebra", None, True),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gone": True}, r"row 1 (0.png): absent is true, so the box must be None, but it is [1.5, 2.25, 20, 30]."),
        ({"gone": "yes"}, "row 1 (0.png): absent is 'yes', expected true or false."),
        ({"gone": 1}, "row 1 (0.png): absent is 1, expected true or false."),
        (
            {"text": ["a dog", "it"], "gone": [True], "bbox": None},
            "row 1 (0.png): absent is [True], expected one, or one for each of the 2 expressions.",
        ),
    ],
)
def test_bad_absent_expressions(change, message):
    row = own_rows()[1] | change
    stream = datasets.IterableDataset.from_generator(lambda: iter([own_rows()[0] | {"gone": None}, row]))
    with pytest.raises(ValueError) as error:
        list(as_grounding_dataset(stream, {**OWN, "absent": "gone"}))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, "the dataset has no column 'image' for image, only photo, text, bbox; columns says"),
        ({**OWN, "box": "boxes"}, "no column 'boxes' for box"),
        ({**OWN, "image": None}, "no column None for image"),
        ({**OWN, "image_id": "id"}, "no column 'id' for image_id"),
        ({**OWN, "absent": "gone"}, "no column 'gone' for absent"),
        ({**OWN, "box": "photo.box"}, r"no column 'photo\.box' for box"),
        ({**OWN, "label": "x"}, "columns may rename image, image_id, expression, box, absent, not 'label'"),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        as_grounding_dataset(own_dataset(), columns)


def test_bad_own_arguments():
    with pytest.raises(ValueError, match='box_format must be "xyxy" or "xywh", not None'):
        as_grounding_dataset(own_dataset(), OWN, None)
    with pytest.raises(ValueError, match="dataset is a DatasetDict, expected a Dataset or an IterableDataset"):
        as_grounding_dataset(datasets.DatasetDict(train=own_dataset()), OWN)
    with pytest.raises(ValueError, match="the dataset has no rows"):
        as_grounding_dataset(own_dataset().select([]), OWN)
