"""Which folder of the package may import which: read from all import statements, wherever in a module they stand."""

import ast
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

PACKAGE = ROOT / "epmvg_hf"

# A place and the places that its modules may import besides modules of its own. A place is the longest of these names
# that a module's dotted name begins with. What is not listed, such as `__init__` and `cli`, may import everything.
MAY_IMPORT = {
    "utils": (),
    "model": (),
    "data": ("utils", "model.letterbox", "model.rgb_images", "data.readers", "data.files"),
    "data.readers": ("utils", "model.letterbox", "data", "data.files"),
    "data.files": (),
    "evaluation": ("utils", "model.rgb_images", "data.files"),
    "distillation": ("utils", "model", "data"),
    "training": ("utils", "model", "data", "evaluation", "distillation"),
    "runs": ("utils", "model", "data", "data.readers", "evaluation", "distillation", "training"),
}


def read_imports(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports, also in functions and under TYPE_CHECKING."""
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        found = imports[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                folder = [package.name, *module.split(".")][: -node.level] if node.level else []
                base = ".".join([*folder, *filter(None, [node.module])])
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                # The last part may be a module, or a name within one.
                inside = name.removeprefix(f"{package.name}.")
                candidates = [inside, inside.rpartition(".")[0]] if name != inside else []
                found.update([candidate for candidate in candidates if candidate in paths][:1])
    return imports


def place_of(module: str) -> str | None:
    """The place that a module belongs to, `None` if it may import everything."""
    places = [place for place in MAY_IMPORT if f"{module}.".startswith(f"{place}.")]
    return max(places, key=len, default=None)


def may_import(importer: str, imported: str) -> bool:
    """Whether the table allows an arrow between two modules."""
    here = place_of(importer)
    if here is None or place_of(imported) == here:
        return True
    return any(imported == allowed or place_of(imported) == allowed for allowed in MAY_IMPORT[here])


def find_circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first one also at the end."""
    finished: set[str] = set()

    def follow(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return None
        for imported in sorted(imports[module]):
            circle = follow(imported, [*trail, module])
            if circle is not None:
                return circle
        finished.add(module)
        return None

    return next((circle for module in sorted(imports) if (circle := follow(module, []))), None)


def test_every_arrow_is_one_that_the_table_allows():
    imports = read_imports(PACKAGE)
    arrows = [(importer, imported) for importer, found in imports.items() for imported in found]
    assert len(arrows) > 50  # the package was read
    assert [arrow for arrow in arrows if not may_import(*arrow)] == []


def test_no_modules_import_each_other_in_a_circle():
    assert find_circle(read_imports(PACKAGE)) is None


def test_every_folder_says_what_lives_there_and_does_nothing_else():
    for path in PACKAGE.rglob("*/__init__.py"):
        (docstring,) = ast.parse(path.read_text()).body
        assert ast.get_docstring(ast.Module([docstring], [])), path


@pytest.mark.parametrize(
    "line",
    [
        "from ..data.loading import load_grounding_dataset",
        "import epmvg_hf.utils",
        "def later():\n    from epmvg_hf.training.trainer import EpmVGTrainer",
        "if TYPE_CHECKING:\n    from ..evaluation import accuracy",
    ],
)
def test_a_forbidden_arrow_is_found(tmp_path, line):
    package = tmp_path / "epmvg_hf"
    for module in ("model/letterbox", "data/loading", "training/trainer", "evaluation/accuracy", "utils"):
        (package / module).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{module}.py").write_text("")
    assert not any(read_imports(package).values())
    (package / "model" / "letterbox.py").write_text(line)
    (imported,) = read_imports(package)["model.letterbox"]
    assert not may_import("model.letterbox", imported)


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_test_imports_another_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = [part for name in names for part in name.split(".")]
            if not {"overlay", "conformance"} & set(path.parts):
                assert not any(part.startswith("test_") or part == "conftest" for part in parts), path
