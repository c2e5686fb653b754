"""The Markdown pages and recipes name files, headings, commands and flags that exist."""

import ast
import re
import tomllib

import pytest
import train_teacher
import typer
from transformers import TrainingArguments

from epmvg_hf import cli
from epmvg_hf.runs import evaluation_arguments
from epmvg_hf.runs.arguments import ARGUMENTS
from epmvg_hf.runs.command_line import parse_arguments
from tests.fixtures.pages import PAGES, RECIPES, TUTORIALS, commands, page_name
from tests.fixtures.paths import EXAMPLES, ROOT


def test_all_pages_are_found():
    names = {page_name(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "examples/README.md", "model_cards/RESULTS.md"} <= names


def test_the_readme_is_short_and_leads_to_every_other_page():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    tables = {f"model_cards/distillation-study/{name}.md" for name in ("ablation", "photos", "second_teacher/photos")}
    others = {page_name(page) for page in PAGES} - {"README.md"} - tables
    assert others == {name for name in others if f"]({name}" in readme}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for file, heading in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", page.read_text()):
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), file
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, heading


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, *TUTORIALS], ids=page_name)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"(?<![\w/.])(?:epmvg_hf|examples|tests|model_cards)/[\w./-]*\w", page.read_text()):
        assert (ROOT / name).exists(), name


# The scripts whose arguments are dataclasses, with those and the file that has their defaults.
TRAINING_SCRIPTS = {
    "examples/run_grounding.py": (ARGUMENTS, "shapes.yaml"),
    "examples/train_teacher.py": ((train_teacher.TeacherArguments, TrainingArguments), "teachers/shapes.yaml"),
}


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, *TUTORIALS], ids=page_name)
def test_commands_can_be_parsed(page, tmp_path, monkeypatch):
    for name in ("my.yaml", "RECIPE.yaml"):
        (tmp_path / name).write_text("output_dir: outputs/my")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if words[0] == "epmvg":
            _check_epmvg(words[1], words[2:])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= {*targets}
        elif words[0] == "pip":
            _check_extras(words)
        elif "pytest" in words:
            _check_selection(words[words.index("pytest") + 1 :])
        elif words[1] == "-c":
            compile(words[2], page_name(page), "exec")
        else:
            assert words[0] in ("accelerate", "torchrun", "python"), words
            script = next(number for number, word in enumerate(words) if word.endswith(".py"))
            _check_arguments(words[script], words[script + 1 :])


def _check_epmvg(name: str, arguments: list[str]) -> None:
    command = typer.main.get_command(cli.app).commands[name]
    if name == "train":
        if "--num_processes" in arguments:  # which is for the launcher
            place = arguments.index("--num_processes")
            del arguments[place : place + 2]
        _check_arguments("examples/run_grounding.py", arguments)
    elif name == "evaluate":
        _check_arguments("examples/evaluate_benchmarks.py", arguments)
    else:
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options, name


def _check_extras(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert {*named.split(",")} <= {*extras}


def _check_arguments(script: str, arguments: list[str]) -> None:
    if script in TRAINING_SCRIPTS:
        types, defaults = TRAINING_SCRIPTS[script]
        arguments = ["RECIPE.yaml" if word == "RECIPE" else word for word in arguments]
        # Not every processor has instructions for bfloat16, which transformers would refuse.
        if not arguments or arguments[0].startswith("-"):
            arguments = [str(EXAMPLES / "configs" / defaults), *arguments]
        parse_arguments(types, "", [*arguments, "--bf16", "false"])
    elif script == "examples/evaluate_benchmarks.py":
        evaluation_arguments.parse_arguments(arguments, script)
    else:
        source = (ROOT / script).read_text()
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == [], script


def _check_selection(arguments: list[str]) -> None:
    """
    Whether a pytest command selects a test: its files exist, and `-k` is part of the name of a test in them, or of a
    case, which a text in them names.
    """
    files = [ROOT / word for word in arguments if word.startswith("tests")]
    tests = [test for file in files for test in ([file] if file.is_file() else sorted(file.rglob("test_*.py")))]
    names = re.findall(r"^def (test_\w+)|\"(\w+)\"", "\n".join(test.read_text() for test in tests), re.MULTILINE)
    word = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
    assert any(word in test or word in case for test, case in names), arguments


def test_the_map_in_contributing_has_the_arrows_that_are_tested():
    house = ast.parse((ROOT / "tests" / "test_house.py").read_text())
    (arrows,) = (
        ast.literal_eval(node.value)
        for node in house.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAY_IMPORT"
    )
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", contributing, re.MULTILINE)
    assert {folder: tuple(re.findall(r"`([\w.]+)`", cell)) for folder, cell in rows} == arrows

    folders = {path.parent.name for path in (ROOT / "epmvg_hf").rglob("*/__init__.py")}
    assert folders <= set(re.findall(r"[├└]── (\w+)/ ", contributing))
