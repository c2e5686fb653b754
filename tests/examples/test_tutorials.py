"""The tutorials run as a reader runs them, with smaller numbers at their top, and their notebooks say the same."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.fixtures.paths import EXAMPLES, ROOT

TUTORIALS = EXAMPLES / "tutorials"
NAMES = ("fine_tune_your_data", "distil_from_your_clip")
BASE = ROOT / "model_cards" / "epmvg-small-flickr30k"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkout in which nothing was made yet, seen from the folder of the tutorials, where a notebook runs."""
    for name in ("examples", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def _run(name: str, **settings: int) -> dict[str, Any]:
    """Runs the script with these numbers at its top, and returns its variables."""
    script = (TUTORIALS / f"{name}.py").read_text()
    for setting, value in settings.items():
        script, changed = re.subn(rf"^{setting} = \d+", f"{setting} = {value}", script, flags=re.MULTILINE)
        assert changed == 1, setting
    variables: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script, f"{name}.py", "exec"), variables)
    return variables


def _numbers(pattern: str, output: str) -> list[float]:
    """The two numbers at the places of `#` in a line of the output."""
    return [float(number) for number in re.search(pattern.replace("#", r"(\d\.\d+)"), output).groups()]


def _is_in(box: dict[str, float], image: Image.Image) -> bool:
    return 0 <= box["xmin"] < box["xmax"] <= image.width and 0 <= box["ymin"] < box["ymax"] <= image.height


def test_fine_tune_your_data(folder, capsys):
    values = _run("fine_tune_your_data", TRAIN_IMAGES=16, VALIDATION_IMAGES=6, STEPS=48)
    output = capsys.readouterr().out

    rows = [json.loads(line) for line in (folder / "outputs/tutorial_data/train.jsonl").open()]
    assert len({row["image"] for row in rows}) == 16 and rows[0].keys() == {"image", "expression", "box"}
    assert f"train: {len(rows)} expressions for 16 images, 0 images missing, 0 rows that cannot be used" in output
    assert "share" not in output

    iou_before, iou_after = _numbers("mean IoU before: #, after: #", output)
    before, after = _numbers(r"Acc@0\.5 before: #, after: #", output)
    assert 0 <= before < after <= 1 and iou_before < iou_after

    saved = load_file(folder / "outputs/tutorial_fine_tuned/model.safetensors")
    base = load_file(BASE / "model.safetensors")
    changed = {name for name in saved.keys() & base if not saved[name].equal(base[name].to(saved[name].dtype))}
    towers = {name for name in saved if name.startswith(("model.vision_model.", "model.text_model."))}
    assert towers and not changed & towers and "box_head.0.weight" in changed

    card = (folder / "outputs/tutorial_fine_tuned/README.md").read_text()
    assert float(re.search(r"\| custom \| validation \| 48 \| ([\d.]+)", card)[1]) == pytest.approx(after, abs=1e-3)
    with Image.open(folder / "outputs/tutorial_fine_tuned/predictions.png") as picture:
        assert picture.width == 1200
    assert values["grounder"].model.config.image_size == 160
    assert _is_in(values["result"]["box"], values["validation"][0]["image"])
    assert f"{values['validation'][0]['expression']!r} is at" in output


def test_distil_from_your_clip(folder, capsys):
    values = _run("distil_from_your_clip", LABELLED_IMAGES=4, CAPTIONED_IMAGES=8, VALIDATION_IMAGES=2, STEPS=3)
    output = capsys.readouterr().out

    assert "expressions with a box" in output and "box" not in values["captions"].column_names
    drawn, middle = _numbers(
        r"the teacher's boxes: Acc@0\.5 #, mean IoU [\d.]+\na box in the middle: Acc@0\.5 #", output
    )
    alone, distilled = _numbers("without the teacher: #, with the teacher and captions: #", output)
    assert all(0 <= share <= 1 for share in (drawn, middle, alone, distilled))
    first, last = _numbers("loss_teacher_map: # at first, # at the end", output)
    assert 0 < last < first

    saved = folder / "outputs" / "tutorial_distilled" / "distilled"
    assert "teacher" not in " ".join(load_file(saved / "model.safetensors"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in saved.iterdir()}
    assert _is_in(values["result"]["box"], values["validation"][0]["image"])


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_say_the_same_as_the_scripts(name):
    """They are what `make_notebooks.py` writes, which here is read back to the script."""
    make_notebook = runpy.run_path(str(TUTORIALS / "make_notebooks.py"))["make_notebook"]
    script, text = (TUTORIALS / f"{name}.py").read_text(), (TUTORIALS / f"{name}.ipynb").read_text()
    assert text == make_notebook(script), "run examples/tutorials/make_notebooks.py"

    cells = json.loads(text)["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    lines = []
    for cell in cells:
        source = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown":
            lines += ["# %% [markdown]", *(f"# {line}".rstrip() for line in source)]
        else:
            lines += ["# %%", *source]
    assert [line for line in lines if line] == [line for line in script.splitlines() if line]


def test_every_script_has_a_notebook():
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == set(NAMES)
    assert {path.stem for path in TUTORIALS.glob("*.py")} == {*NAMES, "make_notebooks"}
