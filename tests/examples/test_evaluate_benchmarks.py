import json
import os
import subprocess
import sys

import evaluate_benchmarks
import pytest

from tests.fixtures.models import tiny_model
from tests.fixtures.own_rows import ROWS, write_images
from tests.fixtures.paths import EXAMPLES


@pytest.mark.parametrize("processes", [1, 2])
def test_one_table_on_any_number_of_processes(tmp_path, processor, processes):
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"] if processes == 2 else []
    command = [
        sys.executable, *launcher, str(EXAMPLES / "evaluate_benchmarks.py"), str(tmp_path / "model"),
        "--benchmarks", "shapes", "--limit", "21", "--batch_size", "2", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("| shapes | test | 21 |") == 1
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert [row["split"] for row in results] == ["validation", "test", "test_composition"]
    assert [row["expressions"] for row in results] == [21] * 3
    assert "| shapes | validation | 21 | 3 |" in (tmp_path / "out" / "evaluation.md").read_text()


def write_own_rows(folder, rows):
    lines = [json.dumps(dict(zip(("image", "expression", "box"), row, strict=True))) for row in rows]
    (write_images(folder) / "test.jsonl").write_text("\n".join(lines))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate_benchmarks.py", *map(str, arguments)])
    evaluate_benchmarks.main()


def test_custom_data(tmp_path, processor, monkeypatch):
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_own_rows(tmp_path / "data", ROWS)
    write_own_rows(tmp_path / "more", [*ROWS, ("a.png", "an expression without a box", None)])
    folders = [f"custom={tmp_path / name}" for name in ("data", "more")]
    options = ["--splits", "test", "--box_format", "xyxy", "--output_dir", tmp_path / "out"]
    run(monkeypatch, tmp_path / "model", "--benchmarks", *folders, *options)
    result, same = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert (result["benchmark"], result["split"], result["expressions"]) == ("custom", "test", 10)
    del result["expressions_per_second"], same["expressions_per_second"]
    assert result == same


def test_scores_groups_and_pictures(tmp_path, processor, monkeypatch):
    tiny_model(box_head="map", score_head=True).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--splits", "test", "--absent_per_image", 2, "--limit", 50, "--pictures", 3]
    run(monkeypatch, tmp_path / "model", "--benchmarks", "shapes", *options, "--output_dir", tmp_path / "out")
    (result,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert result["expressions"] == 40 and set(result["groups"]) == {"kind", "size"}  # 10 of the 50 rows are absent
    for groups in result["groups"].values():
        assert sum(group["count"] for group in groups) == 40
        right = sum(group["count"] * group["accuracy"] for group in groups)
        assert right == pytest.approx(40 * result["acc@0.5"])
    assert 0 <= result["scores"]["presence_auroc"] <= 1 and 0 <= result["scores"]["calibration_error"] <= 1
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"| {result['scores']['presence_auroc']:.3f} |" in table and "| shapes | test | size | " in table
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"scores_shapes_test.png", "failures_shapes_test.png"} <= pictures


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS, ["custom=data", "--splits", "test"], r'box_format is needed for .*test\.jsonl: "xyxy" or "xywh"'),
        (ROWS, ["custom=data"], "custom data has no splits of its own: name the splits to evaluate with --splits"),
        (ROWS, ["custom", "--splits", "test"], 'data_dir is needed for "custom"'),
        (ROWS, ["custom=nowhere", "--splits", "test"], "nowhere is not a folder"),
        (ROWS, ["custom=data", "--splits", "dev"], "no dev.jsonl, .*; there are the splits test"),
        (ROWS, ["refcoko=data"], "name must be one of refcoco, .*, not 'refcoko'"),
        ([("a.png", "x", None)], ["custom=data", "--splits", "test", "--box_format", "xyxy"], "no .* has a box"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch, rows, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write_own_rows(tmp_path / "data", rows)
    with pytest.raises(SystemExit, match=rf"^evaluate_benchmarks\.py: error: .*{message}[^\n]*$"):
        run(monkeypatch, "no-model", "--benchmarks", *arguments)
