"""`epmvg train` starts a training in this process or in several, and says in one line what is wrong."""

import errno
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from epmvg_hf import load_grounding_dataset
from epmvg_hf.cli import app
from tests.fixtures.models import tiny_model
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.process_groups import with_notice

FEW_STEPS = (
    "--teacher_name", "none", "--num_train_images", "4", "--max_eval_rows", "4", "--max_steps", "2", "--do_predict",
    "false", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--bf16", "false",
    "--use_cpu", "true", "--calibrate_scores", "false", "--disable_tqdm", "true",
)  # fmt: skip


FILE = str(EXAMPLES / "configs" / "shapes.yaml")


def test_a_training_in_this_process_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", FILE, "--output_dir", "out", *FEW_STEPS]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/epmvg", *arguments])
    result = CliRunner().invoke(app, [*arguments, "--num_processes", "1"])
    assert result.exit_code == 0, result.output
    assert {file.name for file in Path("out").iterdir()} >= {"model.safetensors", "curves.png"}
    assert "train_loss" in result.stdout
    assert "epmvg train shapes.yaml --output_dir out " in ModelCard.load("out/README.md").text


def test_a_training_in_two_processes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    arguments = ["train", FILE, "--output_dir", "out", *FEW_STEPS, "--num_processes", "2"]
    command = [sys.executable, "-m", "epmvg_hf", *arguments]
    environment = with_notice(environment, tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert result.returncode == 0 and "still open" not in result.stderr, result.stderr[-3000:]
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "epmvg train shapes.yaml --output_dir out " in text and "--disable_tqdm true --num_processes 2\n" in text


def test_a_pipe_that_is_closed_does_not_end_a_training_silently(monkeypatch):
    def print_into_it(*arguments):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("epmvg_hf.runs.training_run.run_training", print_into_it)
    result = CliRunner().invoke(app, ["train", FILE, "--output_dir", "out", "--num_processes", "1"])
    assert result.exit_code == 1
    assert result.stderr == "Error: train stopped, because its output was closed\n"


def test_the_script_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_grounding.py", "--output_dir", "out", "--learnin_rate", "1"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "run_grounding.py"), run_name="__main__")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert line == "epmvg train: error: unknown argument --learnin_rate, did you mean --learning_rate?"


def test_a_mistake_is_one_line_before_several_processes_start():
    result = CliRunner().invoke(app, ["train", FILE, "--num_processes", "2", "--sed", "3"])
    assert result.exit_code == 2
    assert result.stderr == "epmvg train: error: unknown argument --sed, did you mean --seed?\n"


def test_a_mistyped_model_is_named_at_once():
    result = CliRunner().invoke(app, ["train", FILE, "--model_name_or_path", "outputs/x/nomodel"])
    assert result.exit_code == 2 and "there is no folder outputs/x/nomodel" in result.stderr


@pytest.mark.parametrize("argument", ["picture_rows", "max_eval_rows"])
def test_numbers_of_rows_are_checked_before_the_training(argument):
    result = CliRunner().invoke(app, ["train", FILE, "--output_dir", "none", f"--{argument}", "-1"])
    assert result.exit_code == 1 and f"{argument} is -1, expected" in result.stderr


def test_what_cannot_be_trained_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", "mine.yaml", "--num_processes", "1"])
    assert result.exit_code == 1
    assert result.stderr == "Error: FileNotFoundError: there is no file mine.yaml\n"


def test_the_help_is_short_and_names_the_way_to_all_arguments():
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) < 40 and "--help_all" in result.stdout
    result = CliRunner().invoke(app, ["train", "--help_all"])
    assert result.exit_code == 0
    for argument in ("--model_name_or_path", "--dataset_name", "--license", "--ema_decay", "--learning_rate"):
        assert f"  {argument} " in result.stdout


def test_a_test_split_that_is_not_asked_for_is_named(tmp_path, caplog, processor):
    """Of your own data, the default file evaluates the validation split only."""
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    row = load_grounding_dataset("shapes", split="validation", num_images=1)[0]
    (tmp_path / "data").mkdir()
    row["image"].save(tmp_path / "data" / "a.png")
    for split in ("train", "validation", "test"):
        line = f'{{"image": "a.png", "expression": "the circle", "box": {row["box"]}}}\n'
        (tmp_path / "data" / f"{split}.jsonl").write_text(line)
    result = CliRunner().invoke(app, [
        "train", str(EXAMPLES / "configs" / "custom.yaml"), "--data_dir", str(tmp_path / "data"), "--use_cpu", "true",
        "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1",
        "--bf16", "false", "--num_processes", "1",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "there is also a split test, which is evaluated with --do_predict true" in caplog.text
