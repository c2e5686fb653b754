import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

import epmvg_hf
from epmvg_hf import EpmVGConfig, EpmVGForVisualGrounding, EpmVGImageProcessor, EpmVGModel, EpmVGProcessor
from epmvg_hf.model.image_processing_pil_epmvg import EpmVGImageProcessorPil
from epmvg_hf.model.patch_backbone import PatchBackbone
from tests.fixtures.models import tiny_model, tiny_processor
from tests.fixtures.towers import SIZES, save_text_tower, save_vision_tower

# The libraries of the extras (training, data, metrics, plots, teachers) and torchvision, none of which inference
# needs.
OPTIONAL = "accelerate datasets evaluate gradio matplotlib open_clip pandas peft pyarrow scipy timm torchvision"
# A module that is None in `sys.modules` fails to import as if it were not installed.
HIDE = "import sys; sys.modules.update(dict.fromkeys({names!r}.split()))\n"
TEXTS = ["the red circle", "the dog on the left"]


def run(code: str, tmp_path: Path, hidden: str = "") -> dict:
    """Runs code in another process, which cannot import the `hidden` libraries, and reads its last line as JSON."""
    # Shared code is cached in HF_HOME, so every test has its own. The other process does not inherit `sys.path`
    # either, to which transformers adds such caches.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home")}
    command = [sys.executable, "-c", HIDE.format(names=hidden) + code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def image(tmp_path) -> Image.Image:
    path = tmp_path / "image.png"
    Image.effect_noise((50, 40), 80).convert("RGB").save(path)
    return Image.open(path)


@pytest.fixture
def with_code(monkeypatch):
    """Makes all that the test saves include its code."""
    classes = (EpmVGConfig, EpmVGModel, EpmVGForVisualGrounding, EpmVGProcessor)
    for cls in (*classes, EpmVGImageProcessor, EpmVGImageProcessorPil):
        monkeypatch.setattr(cls, "_auto_class", None)  # monkeypatch restores it after the test
    epmvg_hf.register_for_hub()


@pytest.fixture
def shared(tmp_path, with_code):
    model, processor = tiny_model(box_head="map"), tiny_processor()
    save(model, processor, tmp_path)
    return model, processor


def save(model, processor, folder: Path) -> None:
    """The folders that `SHARED_CODE` reads."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model.model.save_pretrained(folder / "bare")


def from_towers(kind: str, folder: Path) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    """A model whose vision tower is a `PatchBackbone`, and its processor, made of towers that are saved in folders."""
    towers = save_vision_tower(kind, folder / "vision"), save_text_tower("bert", folder / "text")
    model = EpmVGForVisualGrounding.from_vision_text_pretrained(*towers, box_head="map", image_size=48, **SIZES)
    assert type(model.model.vision_model) is PatchBackbone
    return model, EpmVGProcessor.from_vision_text_pretrained(*towers, model.config)


def test_every_public_name_is_there():
    for name in epmvg_hf.__all__:
        assert getattr(epmvg_hf, name).__name__ == name
    assert set(epmvg_hf.__all__) <= set(dir(epmvg_hf))  # from which shells complete
    with pytest.raises(AttributeError, match="has no attribute 'EpmVGDetector'"):
        epmvg_hf.EpmVGDetector  # noqa: B018


def test_an_import_prints_nothing(tmp_path):
    """With torchao installed, transformers imports it, and torch warns of what torchao then does."""
    pytest.importorskip("torchao")
    code = """
import logging
before = list(logging.getLogger("torch.utils._pytree").filters)
import epmvg_hf
for name in epmvg_hf.__all__:
    getattr(epmvg_hf, name)
assert logging.getLogger("torch.utils._pytree").filters == before
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def test_type_checkers_see_what_is_imported_when_first_used():
    body = ast.parse(Path(epmvg_hf.__file__).read_text()).body
    (block,) = (node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert {alias.name: node.module for node in block.body for alias in node.names} == epmvg_hf._LAZY


def test_the_import_loads_no_library_that_a_model_of_transformers_does_not(tmp_path):
    code = """
import json
from transformers import DetrModel, ProcessorMixin
before = {name.split(".")[0] for name in sys.modules}
import epmvg_hf
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} - before)))
"""
    assert run(code, tmp_path) == ["epmvg_hf"]


def test_the_auto_classes_need_no_trust(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is EpmVGConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is EpmVGModel
    assert type(AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)) is EpmVGForVisualGrounding
    assert type(AutoProcessor.from_pretrained(tmp_path)) is EpmVGProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EpmVGImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is EpmVGImageProcessorPil


def test_the_package_takes_precedence_over_shared_code(tmp_path, shared):
    assert type(AutoModel.from_pretrained(tmp_path / "model")) is EpmVGModel
    assert type(AutoProcessor.from_pretrained(tmp_path / "model")) is EpmVGProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "model")) is EpmVGImageProcessor


def test_without_registration_neither_code_nor_auto_map_is_saved(tmp_path, shared, monkeypatch):
    """Not even if it was loaded from a folder with code, whose file names would then point at nothing."""
    for cls in (EpmVGConfig, EpmVGForVisualGrounding, EpmVGProcessor, EpmVGImageProcessor):
        monkeypatch.setattr(cls, "_auto_class", None)
    EpmVGForVisualGrounding.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    EpmVGProcessor.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        assert "auto_map" not in (tmp_path / "again" / name).read_text()


SHARED_CODE = """
import json
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor

processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("model", trust_remote_code=True)
inputs = processor(images=Image.open("image.png"), text=TEXTS)
model = AutoModelForZeroShotObjectDetection.from_pretrained("model", trust_remote_code=True)
with torch.no_grad():
    outputs = model(**inputs)
    states = [AutoModel.from_pretrained(folder, trust_remote_code=True)(**inputs).reg_state
              for folder in ("model", "bare")]
model.save_pretrained("again")  # takes the code along once more
processor.save_pretrained("again")
print(json.dumps({
    "classes": [type(processor.image_processor).__name__, type(image_processor).__name__, type(model).__name__],
    "pixel_values": inputs["pixel_values"].tolist(),
    "pred_boxes": outputs.pred_boxes.tolist(),
    "reg_state": [state.tolist() for state in states],
    "boxes": [result["box"].tolist() for result in processor.post_process_grounding(outputs, inputs)],
}))
""".replace("TEXTS", repr(TEXTS))


def test_a_folder_with_code_loads_where_the_package_is_not(tmp_path, shared, image):
    model, processor = shared
    found = run(SHARED_CODE, tmp_path, hidden="epmvg_hf")

    inputs = processor(images=image, text=TEXTS)
    with torch.no_grad():
        outputs, state = model(**inputs), model.model(**inputs).reg_state
    assert found["classes"] == ["EpmVGImageProcessor", "EpmVGImageProcessor", "EpmVGForVisualGrounding"]
    # Bit for bit: Python prints floats so that they read back the same.
    assert found["pixel_values"] == inputs["pixel_values"].tolist()
    assert found["pred_boxes"] == outputs.pred_boxes.tolist()
    assert found["reg_state"] == [state.tolist()] * 2
    assert found["boxes"] == [result["box"].tolist() for result in processor.post_process_grounding(outputs, inputs)]

    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files
    assert "trainer.py" not in files and "teacher.py" not in files


TOWERS = """
new = type(model).from_vision_text_pretrained("vision", "text", image_size=48, **SIZES)
new_processor = type(processor).from_vision_text_pretrained("vision", "text", new.config)
with torch.no_grad():
    features = new.model.vision_model(inputs["pixel_values"]).feature_maps[-1]
print(json.dumps({
    "pred_boxes": outputs.pred_boxes.tolist(),
    "reg_state": [state.tolist() for state in states],
    "new": [type(new_processor.image_processor).__name__, features.tolist()],
}))
""".replace("SIZES", repr(SIZES))


@pytest.mark.parametrize(("kind", "missing"), [("clip", ""), ("vit", OPTIONAL)], ids=["clip", "vit"])
def test_code_with_a_patch_backbone_loads_where_the_package_is_not(tmp_path, with_code, image, kind, missing):
    """Without torchvision the image processor is the one that works with PIL."""
    model, processor = from_towers(kind, tmp_path)
    save(model, processor, tmp_path)
    found = run(SHARED_CODE + TOWERS, tmp_path, hidden=f"epmvg_hf {missing}")

    image_processor = processor.image_processor
    if missing:
        image_processor = EpmVGImageProcessorPil(**image_processor.to_dict())
    inputs = EpmVGProcessor(image_processor, processor.tokenizer, processor.max_text_length)(images=image, text=TEXTS)
    with torch.no_grad():
        outputs, state = model(**inputs), model.model(**inputs).reg_state
        features = model.model.vision_model(inputs["pixel_values"]).feature_maps[-1]
    assert found["pred_boxes"] == outputs.pred_boxes.tolist()
    assert found["reg_state"] == [state.tolist()] * 2
    assert found["new"] == [type(image_processor).__name__, features.tolist()]


def test_shared_code_and_the_package_in_one_process(tmp_path, with_code, image):
    save(*from_towers("clip", tmp_path), tmp_path)
    code = """
import json
from transformers import AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor, pipeline

first, second = (AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in ("model", "bare"))
grounding = AutoModelForZeroShotObjectDetection.from_pretrained("model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("model", trust_remote_code=True)
import epmvg_hf
models = [first, second, type(first).from_pretrained("model"), AutoModel.from_pretrained("model")]
models.append(AutoModel.from_pretrained("model", trust_remote_code=True))
parts = [(model, model.config, model.vision_model) for model in models]
print(json.dumps({
    "modules": [[type(part).__module__.rpartition(".")[0] for part in three] for three in parts],
    "boxes": [grounder("image.png", TEXTS) for grounder in (
        pipeline("visual-grounding", model=grounding, processor=processor),
        pipeline("visual-grounding", model="model"),
    )],
}))
""".replace("TEXTS", repr(TEXTS))
    found = run(code, tmp_path)
    assert found["boxes"][0] == found["boxes"][1]
    found = found["modules"]
    first, second, again, *package = (model for model, _, _ in found)
    assert first == again != second and package == ["epmvg_hf.model"] * 2
    # transformers loads the code of the config and of the model into different modules. The class of the backbone is
    # looked up by its config, so it comes from the module of the config.
    configs, backbones = ([three[part] for three in found] for part in (1, 2))
    assert backbones == configs and configs[3:] == package and configs[0] != configs[1]


def test_shared_code_needs_no_optional_library(tmp_path, shared, image):
    model, processor = shared
    found = run(SHARED_CODE, tmp_path, hidden=f"epmvg_hf {OPTIONAL}")

    assert found["classes"] == ["EpmVGImageProcessorPil", "EpmVGImageProcessorPil", "EpmVGForVisualGrounding"]
    pil = EpmVGProcessor(EpmVGImageProcessorPil(**processor.image_processor.to_dict()), processor.tokenizer, 12)
    assert found["pixel_values"] == pil(images=image, text=TEXTS)["pixel_values"].tolist()
    with torch.no_grad():
        expected = model(**pil(images=image, text=TEXTS)).pred_boxes
    assert found["pred_boxes"] == expected.tolist()


def test_the_base_install_predicts_and_says_what_more_needs(tmp_path, image):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    code = """
import json
import epmvg_hf
from transformers import AutoProcessor, pipeline
from typer.testing import CliRunner
from epmvg_hf.cli import app

def error(use):
    try:
        use()
    except ImportError as error:
        return str(error)

grounder = pipeline("visual-grounding", model="model")
inputs = grounder.processor(images="image.png", text="a dog", boxes=[1, 1, 20, 20])
print(json.dumps({
    "backend": [type(grounder.processor.image_processor).__name__, epmvg_hf.EpmVGImageProcessor.__name__],
    "results": grounder("image.png", TEXTS),
    "lazy": {name: error(lambda: getattr(epmvg_hf, name)) for name in epmvg_hf.__all__},
    "plots": error(lambda: __import__("epmvg_hf.evaluation.visualization")),
    "ground": CliRunner().invoke(app, "ground image.png dog --model model --save x.png".split()).exit_code,
    "check": CliRunner().invoke(app, ["check-data", "refcoco", "."]).output,
    "teacher": error(lambda: epmvg_hf.ClipTeacher.from_pretrained("ViT-B-32", "openai")),
    "data": error(lambda: epmvg_hf.load_grounding_dataset("shapes", split="test")),
    "loss": grounder.model(**inputs).loss.isfinite().item(),
}))
""".replace("TEXTS", repr(TEXTS))
    found = run(code, tmp_path, hidden=OPTIONAL)

    assert found["backend"] == ["EpmVGImageProcessorPil", "EpmVGImageProcessorPil"]
    assert [result["text"] for result in found["results"]] == TEXTS
    train = 'pip install "epmvg_hf[train]"'
    missing = {name: sentence for name, sentence in found["lazy"].items() if sentence is not None}
    assert missing == {
        "EpmVGDataCollator": f"EpmVGDataCollator needs datasets: {train}",
        "EpmVGTrainer": f"EpmVGTrainer needs accelerate: {train}",
        "GroundingAccuracy": f"GroundingAccuracy needs datasets: {train}",
        "GroundingAugmentation": f"GroundingAugmentation needs torchvision: {train}",
        "ImageGroups": f"ImageGroups needs datasets: {train}",
        "add_teacher_boxes": f"add_teacher_boxes needs datasets: {train}",
        "as_grounding_dataset": f"as_grounding_dataset needs datasets: {train}",
        "confirm_boxes": f"confirm_boxes needs datasets: {train}",
    }
    assert found["plots"] == f"draw_grid needs matplotlib: {train}"
    assert found["ground"] == 0 and found["check"] == f"Error: ImportError: epmvg check-data needs datasets: {train}\n"
    assert found["teacher"] == 'ClipTeacher needs open_clip: pip install "epmvg_hf[teacher]"'
    assert found["data"] == f"Loading a dataset needs datasets: {train}"
    assert found["loss"]


def test_a_missing_library_of_training_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "epmvg_hf.evaluation.accuracy", raising=False)
    with pytest.raises(ImportError, match=r'needs evaluate: pip install "epmvg_hf\[train\]"'):
        epmvg_hf.GroundingAccuracy  # noqa: B018
