"""`epmvg ground` as users type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from epmvg_hf.cli import app
from epmvg_hf.commands import grounder
from tests.fixtures.models import tiny_model
from tests.fixtures.own_rows import write_images

TEXTS = ["the red circle", "a dog"]


@pytest.fixture
def folder(tmp_path, processor) -> str:
    """A model with scores, and the images a.png, c.png and more/b.jpg."""
    tiny_model(score_head=True).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    write_images(tmp_path)
    return str(tmp_path / "model")


def run(*arguments) -> tuple[int, str, str]:
    """The exit status, and what stands in stdout and stderr."""
    result = CliRunner().invoke(app, ["ground", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_boxes_are_those_of_the_pipeline(folder, tmp_path):
    image = tmp_path / "a.png"
    expected = pipeline("visual-grounding", model=folder)(str(image), TEXTS)
    status, output, _ = run(image, *TEXTS, "--model", folder)
    assert status == 0
    for line, result in zip(output.splitlines(), expected, strict=True):
        start, text, box_and_score = line.rsplit(": ", 2)
        box, score = box_and_score.rsplit(" ", 1)
        assert (start, text) == (str(image), result["text"])
        assert json.loads(box) == pytest.approx(list(result["box"].values()), abs=0.051)
        assert score == f"({result['score']:.2f})"


def test_lines_of_json_are_rows_of_own_data(folder, tmp_path):
    status, output, _ = run(tmp_path, *TEXTS, "--json", "--model", folder, "--threshold", 0)
    rows = [json.loads(line) for line in output.splitlines()]
    assert status == 0 and [row["image"] for row in rows] == [
        str(tmp_path / name) for name in ("a.png", "a.png", "c.png", "c.png")
    ]
    (tmp_path / "train.jsonl").write_text(output)
    result = CliRunner().invoke(app, ["check-data", "custom", str(tmp_path), "--box-format", "xyxy"])
    assert "| train | custom | 0 |" in result.output and "leads out of its folder" not in result.output


def test_what_is_not_found_has_no_box(folder, tmp_path):
    _, output, _ = run(tmp_path / "a.png", "a dog", "--model", folder, "--threshold", 1)
    assert "a dog: not found (0." in output
    _, output, _ = run(tmp_path / "a.png", "a dog", "--model", folder, "--threshold", 1, "--json")
    assert json.loads(output)["box"] is None


def test_an_expression_may_be_the_name_of_a_folder_without_images(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    status, output, _ = run("a.png", "dog", "--model", folder)
    assert status == 0 and output.startswith("a.png: dog: [")


def test_pictures_have_the_size_of_the_images(folder, tmp_path):
    status, _, errors = run(tmp_path / "a.png", *TEXTS, "--model", folder, "--save", tmp_path / "boxes.png")
    assert status == 0 and "drawn in" in errors and Image.open(tmp_path / "boxes.png").size == (40, 20)
    status, *_ = run(tmp_path / "a.png", tmp_path / "c.png", "a dog", "--model", folder, "--save", tmp_path / "drawn")
    assert status == 0 and {path.name for path in (tmp_path / "drawn").iterdir()} == {"a.png", "c.png"}


def test_what_is_transparent_is_drawn_white(folder, tmp_path):
    Image.new("RGBA", (160, 160), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert run(tmp_path / "clear.png", "a dog", "--model", folder, "--save", tmp_path / "boxes.png")[0] == 0
    assert (np.asarray(Image.open(tmp_path / "boxes.png").convert("L")) > 250).mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photo.jpg", "a dog"), "there is no file photo.jpg"),
        (("a dog", "a cat"), "'a dog' is no file, folder or URL"),
        (("a.png",), "no expression follows the images"),
        (("more", "a dog", "--save", "a.txt"), "must end in one of"),
        (("a.png", "a dog", "--save", "a.png"), "would overwrite the image a.png"),
        (("a.png", "a dog", "--save", "no/where.png"), "there is no folder no to save where.png in"),
        (("a.png", "twice/a.png", "a dog", "--save", "drawn"), "two of the images have the same name"),
        (("empty", "a dog"), "no image (.bmp, "),
        (("text.png", "a dog"), "text.png is no image that can be read"),
        (("a.png", "a dog", "--model", "outputs/none/at/all"), "there is no folder outputs/none/at/all"),
        (("a.png", "a dog", "--model", "more/none"), "there is no folder more/none"),
        (("a.png", "a dog", "--threshold", "2"), "Invalid value for '--threshold'"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    write_images(tmp_path)
    write_images(tmp_path / "twice")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    status, output, errors = run(*arguments)
    assert status == 2 and output == ""
    assert message in " ".join(errors.split())


def test_without_a_shipped_model_one_is_to_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(grounder, "SHIPPED_MODEL", tmp_path / "none")
    status, _, errors = run(write_images(tmp_path) / "a.png", "a dog")
    assert status == 2 and "name a model: a folder or a Hub id" in " ".join(errors.split())


def test_errors_are_one_line_unless_in_debug(folder, tmp_path):
    arguments = ["ground", str(tmp_path / "a.png"), " ", "--model", folder]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert [line for line in result.stderr.splitlines() if "no words" in line or "Error" in line] == [
        result.stderr.splitlines()[-1]
    ]
    assert isinstance(CliRunner().invoke(app, ["--debug", *arguments]).exception, ValueError)


def test_the_command_imports_nothing_heavy_for_its_help(tmp_path):
    code = """
import sys
sys.argv = ["epmvg", "ground", "--help"]
from epmvg_hf.cli import app
try:
    app()
except SystemExit as end:
    print(end.code, sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "0 []", result.stderr
    assert 'epmvg ground photos/ "the dog" --json' in result.stdout


def test_the_package_is_the_command_too(folder, tmp_path):
    command = [sys.executable, "-m", "epmvg_hf", "ground", str(tmp_path / "a.png"), "a dog", "--model", folder]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
    assert result.returncode == 0 and result.stdout.startswith(f"{tmp_path / 'a.png'}: a dog: ["), result.stderr


def test_the_shipped_model_is_where_the_command_looks():
    assert (Path(grounder.SHIPPED_MODEL) / "model.safetensors").is_file()
