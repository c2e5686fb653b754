import json
import os
import runpy
import subprocess
import sys

import pytest

from tests.fixtures.models import tiny_model
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.process_groups import with_notice


def test_two_processes_write_one_table(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(EXAMPLES / "evaluate_benchmarks.py"),
        str(tmp_path / "model"), "--report", "--benchmarks", "shapes", "--limit", "21", "--batch_size", "2",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    environment = with_notice(environment, tmp_path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "still open" not in result.stderr, result.stderr[-3000:]
    assert result.stdout.count("| shapes | test | 21 |") == 1
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert [row["split"] for row in results] == ["validation", "test", "test_composition"]
    assert [row["expressions"] for row in results] == [21] * 3
    assert "| shapes | validation | 21 | 3 |" in (tmp_path / "out" / "evaluation.md").read_text()
    for row in results:
        name = f"shapes_{row['split']}"
        assert len((tmp_path / "out" / f"predictions_{name}.jsonl").read_text().splitlines()) == 21
        assert "21 expressions with a true box on" in (tmp_path / "out" / f"errors_{name}.html").read_text()


def test_the_script_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate_benchmarks.py", "MODEL", "--benchmarks", "shapes=", "b="])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "evaluate_benchmarks.py"), run_name="__main__")
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("epmvg evaluate: error: argument --benchmarks: 'shapes=' is no")
    )
