"""Tests of the evaluation protocol, against plain loops."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from epmvg_hf.evaluation.accuracy import bootstrap_interval, evaluate_boxes
from tests.fixtures.models import tiny_model
from tests.fixtures.paths import EXAMPLES


def _iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


@pytest.fixture
def boxes():
    rng = random.Random(0)

    def box():
        x, y = rng.uniform(0, 20), rng.uniform(0, 20)
        return [x, y, x + rng.uniform(5, 20), y + rng.uniform(5, 20)]

    every = [[box() for _ in range(rng.randint(1, 4))] for _ in range(60)]
    union = [[min(b[0] for b in e), min(b[1] for b in e), max(b[2] for b in e), max(b[3] for b in e)] for e in every]
    return np.array([box() for _ in range(60)]), np.array(union), every


def test_both_protocols_equal_a_plain_loop(boxes):
    predictions, union, every = boxes
    result = evaluate_boxes(predictions, union, ["a"] * 60, every)
    merged = [_iou(p, u) for p, u in zip(predictions, union, strict=True)]
    any_box = [max(_iou(p, b) for b in e) for p, e in zip(predictions, every, strict=True)]
    assert result["acc@0.5"] == pytest.approx(sum(value >= 0.5 for value in merged) / 60)
    assert result["any_box_acc@0.5"] == pytest.approx(sum(value >= 0.5 for value in any_box) / 60)
    assert result["acc@0.5"] != result["any_box_acc@0.5"]
    assert result["mean_iou"] == pytest.approx(sum(merged) / 60)
    assert (result["expressions"], result["images"]) == (60, 1)
    assert "any_box_acc@0.5" not in evaluate_boxes(predictions, union, ["a"] * 60)


def test_interval_is_that_of_a_proportion_and_wider_for_clusters():
    rng = np.random.default_rng(3)
    values = (rng.random(400) < 0.3).astype(float)
    low, high = bootstrap_interval(values, [str(row) for row in range(400)])
    # One expression an image: the normal approximation of a proportion.
    half = 1.96 * (values.mean() * (1 - values.mean()) / 400) ** 0.5
    assert low == pytest.approx(values.mean() - half, abs=0.01) and high == pytest.approx(
        values.mean() + half, abs=0.01
    )
    # Ten expressions an image, all right or all wrong: as wide as for a tenth of the number.
    clustered = np.repeat((rng.random(40) < 0.3).astype(float), 10)
    low, high = bootstrap_interval(clustered, [str(row // 10) for row in range(400)])
    half = 1.96 * (clustered.mean() * (1 - clustered.mean()) / 40) ** 0.5
    assert high - low == pytest.approx(2 * half, abs=0.04)
    assert bootstrap_interval(values, ["one image"] * 400) == [values.mean()] * 2


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluate_writes_one_table_on_any_number_of_processes(tmp_path, processor, processes):
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
    assert result.stdout.count("| shapes | test |") == 1
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert [row["split"] for row in results] == ["validation", "test", "test_composition"]
    assert [row["expressions"] for row in results] == [21] * 3
    assert "| shapes | validation | 21 | 3 |" in (tmp_path / "out" / "evaluation.md").read_text()
