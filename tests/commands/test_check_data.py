"""Tests of `epmvg check-data` and `epmvg exclude-images` on hand-written refer files, and on the real ones."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from epmvg_hf import load_grounding_dataset
from epmvg_hf.cli import app
from epmvg_hf.data.benchmarks import BENCHMARKS, Counts
from epmvg_hf.data.check_data import check_splits, held_out_images, overlaps
from tests.fixtures import refer_files
from tests.fixtures.own_rows import PLACED, write_images
from tests.fixtures.paths import REAL_DATA


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path) -> Path:
    """Image 1 is in train and val, 2 in testA, 3 in testB; the box of image 3 is outside; image 2 is missing."""
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "train2014").mkdir()
    refs = []
    for ref_id, (split, image_id) in enumerate([("train", 1), ("val", 1), ("testA", 2), ("testB", 3)]):
        sentences = [{"sent_id": 2 * ref_id + k, "sent": f"thing {k}", "tokens": [], "raw": ""} for k in range(2)]
        refs.append({"ref_id": ref_id, "ann_id": 10 + ref_id, "image_id": image_id, "split": split})
        refs[-1] |= {"sentences": sentences, "sent_ids": [], "category_id": 1, "file_name": f"x_{image_id}_0.jpg"}
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    names = {image_id: f"COCO_train2014_{image_id:012d}.jpg" for image_id in (1, 2, 3)}
    instances = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 20} for i, name in names.items()],
        "annotations": [
            {"id": 10 + n, "image_id": i, "bbox": [5, 5, 10 if i < 3 else 100, 10]} for n, i in enumerate((1, 1, 2, 3))
        ],
    }
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(instances))
    for image_id in (1, 3):
        Image.new("RGB", (40, 20)).save(tmp_path / "train2014" / names[image_id])
    return tmp_path


def test_reports_counts_problems_and_overlaps(folder):
    reports, absent = check_splits(BENCHMARKS["refcoco"], folder)
    found = {r.split: (r.expressions, r.references, len(r.image_ids), r.missing_images) for r in reports}
    assert found == {
        "train": (2, 1, 1, 0),
        "validation": (2, 1, 1, 0),
        "testA": (2, 1, 1, 1),
        "testB": (0, None, 0, 0),
    }
    assert not absent and not any(report.is_official for report in reports)
    assert "is not within the 40 x 20 pixels" in reports[3].problems[0]
    assert list(overlaps(reports)) == [("train", "validation", 1)]


def test_command_prints_a_table_and_fails_on_what_is_not_official(folder, monkeypatch):
    code, output = run("check-data", "unc", folder)
    assert code == 1
    assert "| validation | refer | 2 (10,834) | 1 (3,811) | 1 (1,500) | 0 | 0 | NO |" in output
    assert "train and validation have 1 images in common" in output and "testB: " in output

    official = {("unc", split): Counts(2, 1, 1) for split in ("train", "validation", "testA")}
    official["unc", "testB"] = Counts(0, None, 0)
    monkeypatch.setitem(BENCHMARKS, "refcoco", replace(BENCHMARKS["refcoco"], counts=official))
    code, output = run("check-data", "refcoco", folder)
    assert code == 1 and "NO" not in output  # the image of testA is missing
    assert run("check-data", "refcoco", folder, "--without-images")[0] == 0
    assert run("check-data", "refcoco", folder, "--split", "train", "--split", "val")[0] == 0
    assert run("check-data", "refcoco", folder, "--split", "testA")[0] == 1


def test_a_split_that_is_absent_is_an_error_unless_others_are_wanted(tmp_path):
    write_images(tmp_path)
    rows = [{"image": image, "expression": expression, "box": box} for image, expression, box in PLACED]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, output = run("check-data", "custom", tmp_path, "--box-format", "xyxy")
    assert code == 0 and "| train | custom | 10 | - | 3 | 0 | 0 | unknown |" in output
    code, output = run("check-data", "custom", tmp_path, "--box-format", "xyxy", "--split", "validation")
    assert code == 1 and "not here: " in output and "validation" in output
    code, output = run("check-data", "custom", tmp_path)
    assert code == 2 and "box_format" in output
    (tmp_path / "c.png").unlink()
    code, output = run("check-data", "custom", tmp_path, "--box-format", "xyxy")
    assert code == 1 and "| 3 | 1 | 0 | unknown |" in output
    (tmp_path / "train.jsonl").unlink()
    code, output = run("check-data", "custom", tmp_path, "--box-format", "xyxy")
    assert code == 1 and "no file of rows (.jsonl, .csv, .json) is in" in output


def test_command_says_what_is_not_here(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    code, output = run("check-data", "refcocog", empty)
    assert code == 1 and "not here: no files of the train split of RefCOCOg" in output.replace("\n", " ")
    code, output = run("check-data", "refcocoh", folder)
    assert code == 2 and "name must be one of" in output


def test_absent_expressions_are_counted_as_any_others(tmp_path):
    root = refer_files.write(tmp_path / "data", refer_files.GROUPS, "grefcoco")
    reports, absent = check_splits(BENCHMARKS["grefcoco"], root)
    found = {r.split: (r.source, r.expressions, r.references, len(r.image_ids), r.problems) for r in reports}
    assert found == {
        "train": ("refer", 4, 3, 2, []),
        **{split: ("refer", 1, 1, 1, []) for split in ("validation", "testA", "testB")},
    }
    assert not absent and all(report.is_official for report in reports)
    code, output = run("check-data", "grefcoco", root)
    assert code == 0 and "| train | refer | 4 | 3 | 2 | 0 | 0 | unknown |" in output
    code, output = run("exclude-images", root)
    assert code == 0 and output.endswith("\n7\n")


def test_excluded_images_are_those_of_validation_and_test(folder, tmp_path):
    assert held_out_images(BENCHMARKS["refcoco"], folder) == {"validation": {"1"}, "testA": {"2"}, "testB": {"3"}}
    code, output = run("exclude-images", folder, "--output", tmp_path / "ids.txt")
    assert code == 0 and (tmp_path / "ids.txt").read_text() == "1\n2\n3\n"
    with pytest.raises(ValueError, match="no image of the train split"):
        load_grounding_dataset("refcoco", folder, exclude=tmp_path / "ids.txt")
    code, output = run("exclude-images", tmp_path / "train2014")
    assert code == 1 and "no validation or test split" in output
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(b"broken")
    code, output = run("exclude-images", folder)
    assert code == 2 and "Error" in output


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the real annotations")
@pytest.mark.parametrize(
    ("name", "data_dir", "row"),
    [
        ("refcoco", "refcoco", "| validation | refer | 10,834 (10,834) | 3,811 (3,811) | 1,500 (1,500) | 1,500 |"),
        ("refcoco+", "transvg_index", "| validation | index | 10,758 (10,758) |"),
        ("gref_umd", "refcoco", "| validation | refer | 4,896 (4,896) | 2,573 (2,573) | 1,300 (1,300) |"),
        ("referit", "referitgame", "| train | official | 54,134 (54,134) | 44,649 (44,649) | 8,995 (8,995) |"),
    ],
)
def test_real_files_have_the_official_counts(name, data_dir, row):
    split = row.split()[1]
    assert run("check-data", name, REAL_DATA / data_dir, "--without-images")[0] == 1  # other splits are not here
    assert run("check-data", name, REAL_DATA / data_dir, "--split", split)[0] == 1  # nor are the images
    status, output = run("check-data", name, REAL_DATA / data_dir, "--split", split, "--without-images")
    assert status == 0
    assert row in output
