"""The Markdown pages and recipes name files, headings, commands and flags that exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import train_teacher
from transformers import TrainingArguments

from epmvg_hf import cli
from epmvg_hf.runs.arguments import ARGUMENTS
from epmvg_hf.runs.command_line import parse_arguments
from tests.fixtures.paths import EXAMPLES, ROOT

PAGES = [path for pattern in ("*.md", "examples/*.md", "model_cards/**/*.md") for path in sorted(ROOT.glob(pattern))]
RECIPES = sorted(EXAMPLES.glob("**/*.yaml"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_pages_are_found():
    names = {_name(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "examples/README.md", "model_cards/RESULTS.md"} <= names


def test_the_readme_is_short_and_leads_to_every_other_page():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    tables = {f"model_cards/distillation-study/{name}.md" for name in ("ablation", "photos")}
    others = {_name(page) for page in PAGES} - {"README.md"} - tables
    assert others == {name for name in others if f"]({name}" in readme}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page):
    for file, heading in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", page.read_text()):
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), file
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, heading


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=_name)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"(?<![\w/.])(?:epmvg_hf|examples|tests|model_cards)/[\w./-]*\w", page.read_text()):
        assert (ROOT / name).exists(), name


def _commands(page: Path) -> Iterator[list[str]]:
    """The shell commands of a page or of a recipe's comments, split into words, without what a # follows."""
    text = page.read_text()
    if page.suffix == ".yaml":
        lines = "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    else:
        lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for line in lines.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if re.match(r"(accelerate|python|pytest|epmvg) ", line) else []
        if words:
            yield words


# The scripts whose arguments are dataclasses, with those and the file that has their defaults.
TRAINING_SCRIPTS = {
    "examples/run_grounding.py": (ARGUMENTS, "shapes.yaml"),
    "examples/train_teacher.py": ((train_teacher.TeacherArguments, TrainingArguments), "teachers/shapes.yaml"),
}


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=_name)
def test_commands_can_be_parsed(page, tmp_path, monkeypatch):
    for name in ("my.yaml", "RECIPE.yaml"):
        (tmp_path / name).write_text("output_dir: outputs/my")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for words in _commands(page):
        if words[0] == "epmvg":
            assert callable(getattr(cli, words[1].replace("-", "_")))
            if words[1] == "train":
                if "--num_processes" in words:  # which is for the launcher
                    place = words.index("--num_processes")
                    del words[place : place + 2]
                _check_arguments("examples/run_grounding.py", words[2:])
        elif words[0] == "pytest":
            _check_selection(words[1:])
        elif words[1] != "-c":
            script = next(number for number, word in enumerate(words) if word.endswith(".py"))
            _check_arguments(words[script], words[script + 1 :])


def _check_arguments(script: str, arguments: list[str]) -> None:
    if script in TRAINING_SCRIPTS:
        types, defaults = TRAINING_SCRIPTS[script]
        arguments = ["RECIPE.yaml" if word == "RECIPE" else word for word in arguments]
        # Not every processor has instructions for bfloat16, which transformers would refuse.
        if not arguments or arguments[0].startswith("-"):
            arguments = [str(EXAMPLES / "configs" / defaults), *arguments]
        parse_arguments(types, "", [*arguments, "--bf16", "false"])
    else:
        source = (ROOT / script).read_text()
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == [], script


def _check_selection(arguments: list[str]) -> None:
    """Whether a pytest command selects a test: its files exist, and `-k` is part of the name of a test in them."""
    files = [ROOT / word for word in arguments if word.startswith("tests")]
    tests = [test for file in files for test in ([file] if file.is_file() else sorted(file.rglob("test_*.py")))]
    names = re.findall(r"^def (test_\w+)", "\n".join(test.read_text() for test in tests), re.MULTILINE)
    word = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
    assert [name for name in names if word in name], arguments


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
