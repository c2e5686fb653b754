"""What an evaluation leaves in its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from epmvg_hf import EpmVGTrainer, load_grounding_dataset
from epmvg_hf.evaluation.accuracy import paired_iou
from epmvg_hf.runs.benchmark_evaluation import run_evaluation
from epmvg_hf.runs.evaluation_arguments import parse_arguments
from tests.fixtures.models import tiny_model
from tests.fixtures.own_rows import ROWS, write_images


@pytest.fixture
def model(tmp_path, processor) -> Path:
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scored_model(tmp_path, processor) -> Path:
    tiny_model(box_head="map", score_head=True).save_pretrained(tmp_path / "scored")
    processor.save_pretrained(tmp_path / "scored")
    return tmp_path / "scored"


def write_own_rows(folder, rows=ROWS, split="test"):
    lines = [json.dumps(dict(zip(("image", "expression", "box"), row, strict=True))) for row in rows]
    (write_images(folder) / f"{split}.jsonl").write_text("\n".join(lines))


def run(model, *arguments) -> Path:
    folder = model.parent / "out"
    command_line = [model, "--benchmarks", *arguments, "--output_dir", folder]
    run_evaluation(parse_arguments([*map(str, command_line)], "epmvg evaluate"))
    return folder


def read_results(folder) -> list[dict]:
    return json.loads((folder / "evaluation.json").read_text())["results"]


def read_predictions(folder, label) -> list[dict]:
    return [json.loads(line) for line in (folder / f"predictions_{label}.jsonl").read_text().splitlines()]


def test_custom_data(tmp_path, model, capsys):
    write_own_rows(tmp_path / "data")
    write_own_rows(tmp_path / "more", [*ROWS, ("a.png", "an expression without a box", None)])
    folders = [f"custom={tmp_path / name}" for name in ("data", "more")]
    folder = run(model, *folders, "--splits", "test", "--box_format", "xyxy")
    result, same = read_results(folder)
    assert (result["benchmark"], result["split"], result["expressions"]) == ("custom", "test", 10)
    assert (result.pop("folder"), same.pop("folder")) == (str(tmp_path / "data"), str(tmp_path / "more"))
    del result["expressions_per_second"], same["expressions_per_second"]
    assert result == same
    assert read_predictions(folder, "custom_test") == read_predictions(folder, "custom_test_2")
    assert capsys.readouterr().out.strip() == (folder / "evaluation.md").read_text().strip()


def test_scores_groups_and_pictures(scored_model):
    folder = run(scored_model, "shapes:test", "--absent_per_image", "2", "--limit", "40", "--pictures", "3")
    (result,) = read_results(folder)
    assert result["expressions"] == 40 and set(result["groups"]) == {"kind", "size"}
    for groups in result["groups"].values():
        assert sum(group["count"] for group in groups) == 40
        right = sum(group["count"] * group["accuracy"] for group in groups)
        assert right == pytest.approx(40 * result["acc@0.5"])
    assert 0 <= result["scores"]["presence_auroc"] <= 1 and 0 <= result["scores"]["calibration_error"] <= 1
    table = (folder / "evaluation.md").read_text()
    assert f"| {result['scores']['presence_auroc']:.3f} |" in table and "| shapes | test | size | " in table
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"scores_shapes_test.png", "failures_shapes_test.png"} <= pictures
    assert not list(folder.glob("*.html"))


def test_predictions_have_all_rows_the_worst_first(scored_model):
    folder = run(scored_model, "shapes:test", "--absent_per_image", "2", "--limit", "40")
    dataset = load_grounding_dataset("shapes", split="test", num_images=5, absent_per_image=2)
    rows = read_predictions(folder, "shapes_test")
    assert all(list(row) == ["image_id", "expression", "box", "true_box", "iou", "score"] for row in rows)
    expected = zip(dataset["image_id"], dataset["expression"], dataset["box"], strict=True)
    assert sorted((row["image_id"], row["expression"], row["true_box"] or []) for row in rows) == sorted(
        (image_id, expression, box or []) for image_id, expression, box in expected
    )
    with_box, absent = rows[:40], rows[40:]
    assert [row["iou"] for row in with_box] == sorted(row["iou"] for row in with_box)
    assert all(row["true_box"] is None and row["iou"] is None and 0 <= row["score"] <= 1 for row in absent)
    iou = paired_iou(*(np.array([row[name] for row in with_box]) for name in ("box", "true_box")))
    assert iou == pytest.approx([row["iou"] for row in with_box], abs=1e-5)
    assert (iou >= 0.5).mean() == read_results(folder)[0]["acc@0.5"]


def test_scores_of_data_in_which_nothing_is_absent(tmp_path, scored_model):
    lines = [{"image": "a.png", "expression": text, "box": [0, 0, 10, 5], "absent": False} for text in ("a", "b")]
    (write_images(tmp_path / "data") / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (result,) = read_results(run(scored_model, f"custom:test={tmp_path / 'data'}", "--box_format", "xyxy"))
    assert "calibration_error" in result["scores"] and "presence_auroc" not in result["scores"]


def test_a_model_without_scores_has_none_in_its_predictions(tmp_path, model):
    write_own_rows(tmp_path / "data")
    rows = read_predictions(run(model, f"custom:test={tmp_path / 'data'}", "--box_format", "xyxy"), "custom_test")
    assert {row["score"] for row in rows} == {None}
    assert "a café" in (tmp_path / "out" / "predictions_custom_test.jsonl").read_text(encoding="utf-8")


def test_the_report_shows_the_worst_errors(model):
    folder = run(model, "shapes:test", "--limit", "40", "--report")
    page = (folder / "errors_shapes_test.html").read_text(encoding="utf-8")
    assert "<h1>model on shapes test</h1>" in page and "Accuracy by kind" in page
    wrong = [row["expression"] for row in read_predictions(folder, "shapes_test") if row["iou"] < 0.5]
    assert page.count("<figure ") <= len(wrong) and any(f">{expression}</b>" in page for expression in wrong)
    assert page.count("data:image/jpeg;base64,") == page.count("<figure ")


def run_out_of_memory(monkeypatch, after: int):
    """Makes the accelerator run out of memory after so many splits."""
    predict, done = EpmVGTrainer.predict, []

    def fail_later(self, dataset):
        if len(done) == after:
            raise torch.OutOfMemoryError("out of memory")
        done.append(dataset)
        return predict(self, dataset)

    monkeypatch.setattr(EpmVGTrainer, "predict", fail_later)


def test_what_is_finished_stays_if_a_later_split_fails(tmp_path, model, capsys, monkeypatch):
    write_own_rows(tmp_path / "data")
    run_out_of_memory(monkeypatch, after=2)
    splits = ["shapes:test", f"custom:test={tmp_path / 'data'}", "shapes:validation"]
    with pytest.raises(ValueError, match="shapes validation failed") as raised:
        run(model, *splits, "--limit", "10", "--box_format", "xyxy")
    where = tmp_path / "out" / "evaluation.md"
    failed = "shapes validation failed: OutOfMemoryError: out of memory"
    assert str(raised.value) == f"the 2 splits before it are finished, see {where}, but {failed}"
    assert [result["benchmark"] for result in read_results(tmp_path / "out")] == ["shapes", "custom"]
    assert "| custom | test | 10 |" in where.read_text() and "| custom | test | 10 |" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    predictions = {"predictions_shapes_test.jsonl", "predictions_custom_test.jsonl"}
    assert names == {"evaluation.json", "evaluation.md", *predictions}


def test_no_results_are_promised_if_the_first_split_fails(tmp_path, model, capsys, monkeypatch):
    run_out_of_memory(monkeypatch, after=0)
    with pytest.raises(ValueError, match=r"^shapes test failed: OutOfMemoryError: out of memory$"):
        run(model, "shapes:test", "--limit", "10")
    assert not any((tmp_path / "out").iterdir()) and "|" not in capsys.readouterr().out
