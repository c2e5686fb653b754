import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from epmvg_hf.runs import command_line
from epmvg_hf.runs.arguments import ARGUMENTS
from epmvg_hf.runs.command_line import check_output_dir, checkpoint_to_resume, parse_arguments, use_hardware
from epmvg_hf.training.hardware import ComputeChoice
from tests.fixtures.paths import EXAMPLES

CONFIGS = EXAMPLES / "configs"


def _parse(*flags: str, file: Path = CONFIGS / "shapes.yaml") -> tuple:
    return parse_arguments(ARGUMENTS, "", [str(file), *flags])


def test_flags_override_files_and_files_override_defaults(tmp_path):
    model, data, _, training = _parse("--learning_rate", "0.5", "--use_cpu", "true")
    assert (data.dataset_name, training.output_dir, training.learning_rate) == ("shapes", "outputs/demo", 0.5)
    assert training.do_train and training.do_predict and model.model_name_or_path is None

    settings = {"dataset_name": "flickr30k_entities", "output_dir": str(tmp_path), "learning_rate": "3e-4"}
    for name, text in (
        ("a.json", json.dumps(settings)),
        ("a.yaml", "\n".join(f"{k}: {v}" for k, v in settings.items())),
    ):
        (tmp_path / name).write_text(text)
        _, data, _, training = _parse("--seed", "7", file=tmp_path / name)
        assert (data.dataset_name, training.learning_rate, training.seed) == ("flickr30k_entities", 3e-4, 7)
        assert not training.do_train


def test_a_file_can_take_defaults_from_a_base_file(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 0.1\nseed: 3\noutput_dir: x\n")
    (tmp_path / "a.yaml").write_text("base: base.yaml\nlearning_rate: 0.2\n")
    training = _parse("--output_dir", str(tmp_path), file=tmp_path / "a.yaml")[3]
    assert (training.learning_rate, training.seed, training.output_dir) == (0.2, 3, str(tmp_path))


def test_an_unknown_argument_in_a_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("learnin_rate: 0.1\noutput_dir: x\n")
    with pytest.raises(ValueError, match=r"a\.yaml: unknown argument learnin_rate, did you mean learning_rate\?"):
        _parse(file=tmp_path / "a.yaml")


def test_a_file_that_is_none_of_arguments_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("- learning_rate\n")
    with pytest.raises(ValueError, match=r"a\.yaml: expected arguments as NAME: VALUE"):
        _parse(file=tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.yaml"):
        _parse(file=tmp_path / "b.yaml")
    with pytest.raises(ValueError, match="expected a file of arguments"):
        parse_arguments(ARGUMENTS, "", ["--seed", "1"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: [1", r"a\.yaml cannot be read as YAML: "),
        ("a.json", '{"seed": 1', r"a\.json cannot be read as JSON: "),
        ("a.yaml", "1: 2", "expected arguments as NAME: VALUE"),
        ("a.yaml", "help: true", "unknown argument help"),
        (
            "a.yaml",
            "base: a.yaml",
            "base is 'a.yaml', expected the name of another file, which has no base in a circle",
        ),
        ("a.yaml", "base: [b.yaml]", r"base is \['b.yaml'\], expected the name of another file"),
        ("a.yaml", "seed: [1]", "seed is a list, expected one value"),
        ("a.yaml", "seed:", "seed has no value"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        _parse(file=tmp_path / name)


def test_values_of_a_file_have_the_types_of_flags(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('{\n\t"output_dir": "x",\n\t"max_steps": 3, "do_train": true, "learning_rate": 1e-4}')
    training = _parse(file=file)[3]
    assert (training.max_steps, training.do_train, training.learning_rate) == (3, True, 1e-4)
    file = tmp_path / "a.yaml"
    file.write_text("output_dir: x\neval_strategy: no\ndo_train: yes\nfrozen_parameters: [a, b]\n")
    training = _parse(file=file)[3]
    assert (training.eval_strategy, training.do_train, training.frozen_parameters) == ("no", True, ["a", "b"])
    file.write_text("output_dir: x\nseed: 1.5\n")
    with pytest.raises(SystemExit, match="2"):
        _parse(file=file)
    assert "argument --seed: invalid int value: '1.5'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnin_rate", "1"], "unknown argument --learnin_rate, did you mean --learning_rate?"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        _parse(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: {message}")


def test_paths_in_a_file_start_in_its_folder_or_else_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "teacher").mkdir(parents=True)
    (tmp_path / "work" / "outputs" / "towers").mkdir(parents=True)
    (tmp_path / "recipes" / "own.json").touch()
    (tmp_path / "recipes" / "a.yaml").write_text(
        "output_dir: out\nconfig_name: own.json\nteacher_name: local-dir:teacher\n"
        "vision_name_or_path: outputs/towers\ntext_name_or_path: google-bert/bert-base-uncased\n"
    )
    monkeypatch.chdir(tmp_path / "work")
    model, _, _, training = _parse(file=Path("../recipes/a.yaml"))
    assert Path(model.config_name).resolve() == tmp_path / "recipes" / "own.json"
    assert model.teacher_name == "local-dir:../recipes/teacher"
    assert (model.vision_name_or_path, training.output_dir) == ("outputs/towers", "out")
    assert model.text_name_or_path == "google-bert/bert-base-uncased"


def test_recipes_find_what_comes_along_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = _parse()[0].teacher_name.removeprefix("local-dir:")
    assert (Path(folder) / "open_clip_config.json").exists()
    folder = _parse(file=CONFIGS / "custom.yaml")[0].model_name_or_path
    assert (Path(folder) / "config.json").exists()


def test_a_run_does_not_begin_beside_checkpoints_of_another(tmp_path):
    def check(**settings):
        check_output_dir(TrainingArguments(str(tmp_path), use_cpu=True, **settings))

    check(do_train=True)
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(
        ValueError, match=r"has checkpoints of an earlier run: go on with it \(--resume_from_checkpoint"
    ):
        check(do_train=True)
    check(do_train=True, resume_from_checkpoint="true")
    check(do_train=False)


def test_resuming_finds_the_last_checkpoint_or_says_that_there_is_none(tmp_path):
    def resume(value):
        arguments = TrainingArguments(str(tmp_path), resume_from_checkpoint=value, use_cpu=True)
        return checkpoint_to_resume(arguments)

    assert resume(None) is None and resume("folder") == "folder"
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        resume("true")
    for name in ("checkpoint-5", "checkpoint-10"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")  # the other one was not written to its end
    assert resume("true") == str(tmp_path / "checkpoint-5")


@pytest.fixture
def fast_in(monkeypatch):
    """A machine that is fast in a precision."""

    def set_fast(precision: str):
        attention = "eager" if precision == "bf16" else None
        choice = ComputeChoice(precision, attention, "as this test says")
        monkeypatch.setattr(command_line, "hardware_choice", lambda use_cpu: choice)

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return set_fast


@pytest.mark.parametrize(
    ("fast", "arguments", "launched", "precision"),
    [
        ("bf16", [], "no", "bf16"),
        ("no", [], "no", "no"),
        ("no", ["--bf16", "true"], "no", "bf16"),
        ("bf16", ["--bf16", "false"], "no", "no"),
        ("no", [], "bf16", "bf16"),
    ],
)
def test_the_hardware_decides_on_the_precision_where_nobody_else_does(
    fast_in, monkeypatch, fast, arguments, launched, precision
):
    fast_in(fast)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    training = _parse(*arguments, "--use_cpu", "true")[3]
    assert training.mixed_precision == precision


def test_other_libraries_only_show_warnings():
    code = """
import logging
from epmvg_hf.runs.command_line import show_own_messages
show_own_messages()
for name in (None, "open_clip", "epmvg_hf.runs.command_line", "epmvg_hf.training.trainer"):
    logging.getLogger(name).info("")
logging.warning("")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = [line for line in result.stderr.splitlines() if line.startswith(("INFO", "WARNING"))]
    assert shown == ["INFO:epmvg_hf.runs.command_line:", "INFO:epmvg_hf.training.trainer:", "WARNING:root:"]


def test_one_line_of_the_log_says_how_and_why(fast_in, monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads = torch.get_num_threads()
    caplog.set_level("INFO")
    try:
        fast_in("bf16")
        assert use_hardware(_parse("--use_cpu", "true")[3]) == "eager"
        assert use_hardware(_parse("--use_cpu", "true", "--bf16", "false")[3]) is None
    finally:
        torch.set_num_threads(threads)
    lines = [record.getMessage() for record in caplog.records if record.name == command_line.__name__]
    assert lines == [f"computing in {name}, 3 threads (as this test says)" for name in ("bfloat16", "float32")]


def test_no_configuration_asks_for_a_precision():
    for file in CONFIGS.rglob("*.yaml"):
        assert not {"bf16", "fp16"} & set(yaml.safe_load(file.read_text())), file
