"""Tests of the one call that gives any of the benchmarks."""

import json
import sys

import pytest
from PIL import Image

from epmvg_hf import load_grounding_dataset

XML = (
    "<annotation><size><width>8</width><height>6</height></size><object><name>3</name><bndbox>"
    "<xmin>2</xmin><ymin>1</ymin><xmax>8</xmax><ymax>6</ymax></bndbox></object></annotation>"
)


@pytest.fixture
def flickr(tmp_path) -> str:
    for name in ("Annotations", "Sentences", "flickr30k_images"):
        (tmp_path / name).mkdir()
    (tmp_path / "val.txt").write_text("7\n")
    (tmp_path / "Annotations" / "7.xml").write_text(XML)
    (tmp_path / "Sentences" / "7.txt").write_text("[/EN#3/animals A dog] .\n" * 5)
    Image.new("RGB", (8, 6)).save(tmp_path / "flickr30k_images" / "7.jpg")
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_flickr30k_entities(flickr, streaming):
    rows = list(load_grounding_dataset("flickr30k_entities", flickr, split="val", streaming=streaming))
    assert len(rows) == 5
    assert rows[0]["expression"] == "A dog" and rows[0]["box"] == [1, 0, 8, 6] and rows[0]["image"].size == (8, 6)


def test_missing_images_reach_the_reader(flickr, tmp_path):
    (tmp_path / "flickr30k_images" / "7.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1 images"):
        load_grounding_dataset("flickr30k_entities", flickr, split="val")
    kept = load_grounding_dataset("flickr30k_entities", flickr, split="val", missing_images="keep")
    assert kept["image"][:] == [None] * 5


@pytest.mark.parametrize("streaming", [False, True])
def test_shapes(streaming):
    dataset = load_grounding_dataset("shapes", split="val", num_images=3, streaming=streaming)
    rows = list(dataset)
    assert str(dataset.split) == "validation"
    assert len({row["image_id"] for row in rows}) == 3
    assert {"image", "image_id", "expression", "box"} <= set(rows[0])
    other = load_grounding_dataset("shapes", split="validation", num_images=3, streaming=streaming, seed=1)
    assert [row["box"] for row in other] != [row["box"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "refcoco3"}, "name must be one of refcoco, refcoco[+], .* shapes and custom, not 'refcoco3'"),
        ({"name": "shapes", "split": "testA"}, "train, validation, test, test_composition"),
        ({"name": "shapes", "data_dir": "x"}, 'data_dir does not apply to "shapes"; its own arguments are seed and'),
        ({"name": "shapes", "split_by": "umd"}, 'split_by does not apply to "shapes"'),
        ({"name": "shapes", "missing_images": "skip"}, 'missing_images does not apply to "shapes"'),
        ({"name": "shapes", "exclude": [3]}, 'exclude does not apply to "shapes"'),
        ({"name": "shapes", "box_format": "xywh"}, 'box_format does not apply to "shapes"'),
        ({"name": "flickr30k_entities"}, 'data_dir is needed for "flickr30k_entities"'),
        ({"name": "custom"}, 'data_dir is needed for "custom"'),
        ({"name": "custom", "data_dir": ".", "split_by": "umd"}, 'split_by does not apply to "custom"'),
        ({"name": "flickr", "data_dir": ".", "num_images": 3}, 'num_images does not apply to "flickr"'),
        ({"name": "flickr", "data_dir": ".", "seed": 1}, "own arguments are data_dir, split_by, image_dir and source"),
        ({"name": "flickr", "data_dir": ".", "columns": {"box": "b"}}, 'columns does not apply to "flickr"'),
        ({"name": "flickr", "data_dir": ".", "split_by": "umd"}, "can be split by standard, not by 'umd'"),
        ({"name": "flickr", "data_dir": ".", "split": "testA"}, "has the splits train, validation, test, not 'testA'"),
        ({"name": "flickr", "data_dir": ".", "source": "refer"}, "must be one of official, index, not 'refer'"),
        ({"name": "flickr", "data_dir": ".", "boxes": "all"}, 'boxes must be "union" or "any", not \'all\''),
        ({"name": "refcoco", "data_dir": ".", "boxes": "any"}, 'boxes must be "union" for RefCOCO'),
        ({"name": "refcoco", "data_dir": ".", "split": "test"}, "has the splits train, validation, testA, testB, not"),
        ({"name": "refcoco_unc", "data_dir": ".", "split_by": "google"}, "means the split by unc, but split_by is"),
        (
            {"name": "refcocog_google", "data_dir": ".", "split": "test"},
            "has the splits train, validation, not 'test'",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_grounding_dataset(**arguments)


def test_bad_missing_images(flickr):
    with pytest.raises(ValueError, match='"error", "skip" or "keep"'):
        load_grounding_dataset("flickr30k_entities", flickr, split="val", missing_images="drop")


@pytest.mark.parametrize("name", ["refcoco", "gref", "referit_berkeley", "flickr", "referit"])
def test_an_empty_folder_is_told_what_it_lacks(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no files of the train split of .* in {tmp_path}, expected .*; or "):
        load_grounding_dataset(name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere is not a folder"):
        load_grounding_dataset(name, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"image_dir .*nowhere is not a folder"):
        load_grounding_dataset(name, tmp_path, image_dir=tmp_path / "nowhere")


def test_images_are_excluded_by_ids_or_a_file_of_ids(tmp_path):
    (tmp_path / "custom").mkdir()
    lines = []
    for number in (1, 2, 3):
        Image.new("RGB", (8, 6)).save(tmp_path / "custom" / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "expression": "it", "box": [1, 2, 3, 4]}))
    (tmp_path / "custom" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "ids.txt").write_text("1.png\n3.png\n")
    for exclude in (["1.png", "3.png"], tmp_path / "ids.txt"):
        dataset = load_grounding_dataset("custom", tmp_path / "custom", box_format="xyxy", exclude=exclude)
        assert dataset["image_id"][:] == ["2.png"]
    with pytest.raises(ValueError, match="no image of the train split of custom is left"):
        load_grounding_dataset("custom", tmp_path / "custom", box_format="xyxy", exclude=["1.png", "2.png", "3.png"])


def test_datasets_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "epmvg_hf\[train\]"'):
        load_grounding_dataset("shapes")
