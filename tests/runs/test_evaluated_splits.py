import json

import pytest

from epmvg_hf import EpmVGTrainingArguments
from epmvg_hf.runs.evaluated_splits import load_splits
from epmvg_hf.runs.evaluation_arguments import parse_arguments
from tests.fixtures.own_rows import GROUPED, ROWS, write_images


def write_own_rows(folder, rows=ROWS, split="test"):
    lines = [json.dumps(dict(zip(("image", "expression", "box"), row, strict=True))) for row in rows]
    (write_images(folder) / f"{split}.jsonl").write_text("\n".join(lines))


def load(tmp_path, *arguments):
    parsed = parse_arguments(["MODEL", "--benchmarks", *arguments], "epmvg evaluate")
    return load_splits(parsed, EpmVGTrainingArguments(str(tmp_path / "out"), use_cpu=True))


def test_each_benchmark_may_have_splits_of_its_own(tmp_path):
    for split in ("one", "two", "test"):
        write_own_rows(tmp_path / "data", split=split)
    own = f"custom:two,one={tmp_path / 'data'}"
    options = ["--splits", "test", "--box_format", "xyxy", "--limit", "3"]
    splits = load(tmp_path, own, "shapes", f"custom={tmp_path / 'data'}", *options)
    named = [(split.benchmark, split.split) for split in splits]
    assert named == [("custom", "two"), ("custom", "one"), ("shapes", "test"), ("custom", "test")]
    assert [len(split.dataset) for split in splits] == [3] * 4


def test_all_splits_but_training_are_evaluated_if_none_is_named(tmp_path):
    splits = load(tmp_path, "shapes", "--limit", "1")
    assert [split.label for split in splits] == ["shapes_validation", "shapes_test", "shapes_test_composition"]


def test_files_of_splits_with_the_same_name_have_different_names(tmp_path):
    for folder in ("a", "b"):
        write_own_rows(tmp_path / folder)
        write_own_rows(tmp_path / folder, split="test_2")
    folders = [f"custom:test,test_2={tmp_path / name}" for name in ("a", "b")]
    labels = [split.label for split in load(tmp_path, *folders, "--box_format", "xyxy")]
    assert labels == ["custom_test", "custom_test_2", "custom_test_3", "custom_test_2_2"]


def test_rows_without_a_box_are_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "epmvg_hf")
    write_own_rows(tmp_path / "data", [("a.png", "without a box", None), *ROWS])
    (split,) = load(tmp_path, f"custom:test={tmp_path / 'data'}", "--box_format", "xyxy", "--limit", "4")
    assert "without a box" not in split.dataset["expression"] and len(split.dataset) == 4
    assert "custom test: 1 expressions without a box are left out" in caplog.text


def test_a_limit_keeps_absent_expressions_of_the_images_that_are_left(tmp_path):
    write_own_rows(tmp_path / "data")
    options = ["--box_format", "xyxy", "--absent_per_image", "2", "--limit", "4"]
    (split,) = load(tmp_path, f"custom:test={tmp_path / 'data'}", *options)
    kept, absent = (split.dataset.filter(lambda row, has=has: row["absent"] == has) for has in (False, True))
    assert kept["expression"][:] == [row[1] for row in GROUPED[:4]]
    assert len(absent) == 2 * len(set(kept["image_id"])) and set(absent["image_id"]) == set(kept["image_id"])


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS, ["custom=data", "--splits", "test"], r'box_format is needed for .*test\.jsonl: "xyxy" or "xywh"'),
        (ROWS, ["custom=data"], "custom data has no splits of its own: name those to evaluate, as in custom:test=FOL"),
        (ROWS, ["custom:test"], 'data_dir is needed for "custom"'),
        (ROWS, ["custom:test=nowhere"], "nowhere is not a folder"),
        (ROWS, ["custom:dev=data"], "no dev.jsonl, .*; there are the splits test"),
        (ROWS, ["shapes", "refcoko=data"], "name must be one of refcoco, .*, not 'refcoko'"),
        (
            [("a.png", "x", None)],
            ["custom:test=data", "--box_format", "xyxy"],
            "none of the 1 .* of custom test has a box",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(tmp_path, monkeypatch, rows, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_own_rows(tmp_path / "data", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path, *arguments)
