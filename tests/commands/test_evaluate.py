"""`epmvg evaluate` as users type it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from epmvg_hf.cli import app
from epmvg_hf.runs import benchmark_evaluation
from tests.fixtures.models import tiny_model


def run(*arguments) -> tuple[int, str, str]:
    """The exit status, and what stands in stdout and stderr."""
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], prog_name="epmvg")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def model(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_help_names_all_options_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['epmvg', 'evaluate', '--help']\n"
        "from epmvg_hf.cli import app\n"
        "try:\n    app()\nfinally:\n    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: epmvg evaluate MODEL --benchmarks ")
    for option in ("--splits", "--box_format", "--absent_per_image", "--report", "--output_dir"):
        assert f"\n  {option}" in result.stdout


def test_a_benchmark_is_evaluated(tmp_path, model):
    options = ["--limit", 20, "--report", "--output_dir", tmp_path / "out"]
    status, output, _ = run(model, "--benchmarks", "shapes:validation,test", *options)
    assert status == 0 and "| shapes | validation | 20 |" in output and "| shapes | test | 20 |" in output
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert [result["split"] for result in results] == ["validation", "test"]
    assert (tmp_path / "out" / "errors_shapes_test.html").exists()


def test_an_argument_that_is_unknown_is_named():
    status, _, errors = run("MODEL", "--benchmarks", "shapes", "--limits", "20")
    assert status == 2 and errors.splitlines()[-1] == "epmvg evaluate: error: unrecognized arguments: --limits 20"


def test_what_cannot_be_evaluated_is_refused_in_one_line_before_the_model_is_loaded(tmp_path):
    status, _, errors = run(tmp_path, "--benchmarks", "shapes:test", f"custom={tmp_path}", "--limit", 1)
    (line,) = errors.splitlines()
    assert status == 1
    assert line == (
        "Error: ValueError: custom data has no splits of its own: name those to evaluate, as in custom:test=FOLDER"
    )


def test_a_split_that_fails_is_one_line_after_the_table_of_those_before_it(tmp_path, model, monkeypatch):
    def fail(path, *arguments):
        if "validation" in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(benchmark_evaluation, "write_predictions", fail)
    options = ["--limit", 10, "--output_dir", tmp_path / "out"]
    status, output, errors = run(model, "--benchmarks", "shapes:test,validation", *options)
    assert status == 1 and "| shapes | test | 10 |" in output
    place = tmp_path / "out" / "evaluation.md"
    assert errors.splitlines()[-1] == (
        f"Error: ValueError: the split before it is finished, see {place}, but shapes validation failed: "
        "OSError: No space left on device"
    )


def test_a_mistyped_model_is_named_at_once(tmp_path):
    status, _, errors = run("outputs/x/nomodel", "--benchmarks", "shapes:test", "--output_dir", tmp_path)
    assert status == 2 and "there is no folder outputs/x/nomodel" in errors
