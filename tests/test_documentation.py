"""
Every example of the docstrings and every Python block of the Markdown pages, and the short ones of their commands, run
as a user would run them. `tests/test_pages.py` parses all commands.
"""

import dataclasses
import doctest
import importlib
import inspect
import io
import json
import pkgutil
import re
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import PushToHubMixin
from typer.testing import CliRunner

import epmvg_hf
from epmvg_hf import ClipTeacher, EpmVGTrainer, EpmVGTrainingArguments, cli, load_grounding_dataset
from epmvg_hf.model.card_mixin import general_card
from tests.fixtures import flickr30k_files, index_files, original_transvg, refer_files
from tests.fixtures.hub import FakeHub
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor
from tests.fixtures.pages import PAGES, code_blocks, commands, page_name
from tests.fixtures.paths import ROOT
from tests.fixtures.towers import save_clip, save_text_tower, save_vision_tower

# Public methods that a library calls, at the time and with the arguments that it documents.
HOOKS = {
    "EpmVGConfig": {"validate", "validate_architecture"},
    "EpmVGImageProcessor": {"process_image", "resize"},
    "EpmVGImageProcessorMixin": {"post_process_object_detection", "to_dict"},
    "EpmVGImageProcessorPil": {"resize"},
    "EpmVGModel": {"get_input_embeddings", "set_input_embeddings", "train"},
    "EpmVGPreTrainedModel": {"from_pretrained", "save_pretrained"},
    "EpmVGProcessor": {"model_input_names"},
    "EpmVGTrainer": {
        "compute_loss",
        "evaluation_loop",
        "get_batch_samples",
        "get_eval_dataloader",
        "get_test_dataloader",
        "get_train_dataloader",
        "log",
        "prediction_step",
    },
    "EpmVGTrainingArguments": {"n_gpu"},
    "ModelCardMixin": {"save_pretrained"},
    "StudentTrainer": {"call_model_init", "create_optimizer", "create_scheduler", "get_decay_parameter_names"},
    "VisualGroundingPipeline": {"collate", "get_iterator", "postprocess", "preprocess", "run_single"},
}

# Names besides `__all__` that README, examples and docstrings use.
ALSO_PUBLIC = {
    "training.augmentation": ["mirror"],
    "training.known_words": ["KnownWords"],
    "data.benchmarks": ["resolve_name"],
    "evaluation.blind_baselines": ["blind_accuracy"],
    "data.check_data": ["check_splits", "held_out_images"],
    "data.captioned_groups": ["CaptionedGroups"],
    "data.readers.custom": ["CustomData"],
    "evaluation.accuracy": ["bootstrap_interval", "evaluate_boxes", "find_boxes", "paired_iou"],
    "evaluation.error_kinds": ["name_kinds", "worst_first"],
    "evaluation.error_report": ["make_error_report"],
    "model.letterbox": ["Letterbox"],
    "model.losses": ["box_loss", "box_map_target", "grounding_loss", "has_box", "map_loss"],
    "distillation.losses": ["feature_loss", "relation_loss", "teacher_map_target"],
    "evaluation.modality_gap": ["modality_gap"],
    "evaluation.score_quality": [
        "Calibration",
        "ScoreBin",
        "accuracy_over_coverage",
        "draw_scores",
        "evaluate_scores",
        "measure_calibration",
        "presence_auroc",
    ],
    "model.card_mixin": ["general_card"],
    "evaluation.training_curves": ["draw_training_curves"],
    "training.model_card": ["Evaluation", "make_card"],
    "model.patch_backbone": ["PatchBackbone", "PatchBackboneConfig"],
    "distillation.patch_embeddings": ["pooled_and_patches"],
    "model.pipeline_visual_grounding": ["GroundingResults"],
    "data.files.safe_pickle": ["read_pickle", "read_torch_file"],
    "data.shapes": ["load_shapes", "make_scene", "render"],
    "distillation.teacher_cache": ["TeacherCache"],
    "distillation.convert_clip": ["load_transformers_clip"],
    "model.convert_transvg": ["convert_transvg", "read_transvg_checkpoint"],
    "evaluation.visualization": ["draw_grid"],
}


# Where examples run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working folder that the examples have in mind: trained models, pictures, benchmarks, towers "of the Hub"."""
    root = tmp_path_factory.mktemp("documentation")
    for name in ("examples", "model_cards"):
        (root / name).symlink_to(ROOT / name)
    tiny_model(box_head="map").save_pretrained(root / "outputs" / "demo")
    tiny_processor().save_pretrained(root / "outputs" / "demo")

    rows = _shapes()
    for row, name in ((0, "scene.png"), (0, "image.jpg"), (8, "a.jpg"), (16, "b.jpg")):
        rows[row]["image"].save(root / name)
    flickr30k_files.write(root / "flickr30k_entities")
    refer_files.write(root / "refer" / "data")
    index_files.write(root / "index", "unc", split="val")
    (root / "my_data").mkdir()
    rows[0]["image"].save(root / "my_data" / "0001.png")
    own = {"image": "0001.png", "expression": ["the green triangle", "a triangle"], "box": [24, 59, 57, 88]}
    (root / "my_data" / "train.jsonl").write_text(json.dumps(own))

    # The names and the columns that the guide, examples/README.md, uses.
    (root / "rows").mkdir()
    few = rows.select([0, 1, 8]).select_columns(["image", "expression", "box"])
    few.rename_columns({"image": "photo", "expression": "phrase", "box": "bbox"}).to_parquet(root / "rows/0.parquet")
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "0.tar", "w") as shard:
        shard.add(root / "a.jpg", "000001.jpg")
        (root / "000001.json").write_text(json.dumps({"expression": ["a star"], "box": [1.0, 2.0, 30.5, 40.0]}))
        shard.add(root / "000001.json", "000001.json")

    # What examples/images/README.md makes smaller.
    Image.new("RGB", (600, 400)).save(root / "horse.webp")

    towers = {
        "facebook/detr-resnet-50": lambda path: save_vision_tower("detr", path),
        "google-bert/bert-base-uncased": lambda path: save_text_tower("bert", path, positions=40),
        "openai/clip-vit-base-patch32": save_clip,
    }
    for name, save in towers.items():
        (root / name).parent.mkdir()
        save(root / name)
    torch.save({"model": original_transvg.original().state_dict()}, root / "TransVG_R50_unc.pth")
    return root


def _shapes():
    """Four drawn scenes with eight expressions each."""
    return load_grounding_dataset("shapes", split="validation", num_images=4)


def _trainer() -> EpmVGTrainer:
    arguments = EpmVGTrainingArguments("outputs/mine", **ONE_STEP)
    data = {"train_dataset": _shapes(), "eval_dataset": _shapes()}
    return EpmVGTrainer(tiny_model(box_head="map"), arguments, processing_class=tiny_processor(), **data)


# The names that examples use without importing them.
AT_HAND = {
    "model": lambda: tiny_model(box_head="map", teacher_projection_dim=128),
    "processor": tiny_processor,
    "image": lambda: Image.open("scene.png"),
    "dataset": _shapes,
    "teacher": lambda: ClipTeacher.from_pretrained("local-dir:model_cards/clip-tiny-shapes"),
    "trainer": _trainer,
    "grounder": lambda: pipeline("visual-grounding", model="outputs/demo"),
}


@pytest.fixture(autouse=True)
def _quiet_and_in_its_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for value in DOCUMENTED.values():
        if inspect.isclass(value) and issubclass(value, PushToHubMixin):
            monkeypatch.setattr(value, "_auto_class", None, raising=False)  # put back if an example registers them
    # A trainer's progress bars are for the screen, and differ from run to run.
    for callback in (PrinterCallback, ProgressCallback):
        monkeypatch.setattr(callback, "on_log", lambda *args, **kwargs: None)


@pytest.fixture
def published(hub: FakeHub, folder) -> FakeHub:
    """A fake Hub. Uploads lie in a folder with the name of the repository, where transformers looks first."""
    upload = hub.create_commit

    def create_commit(repo_id, operations, **kwargs):
        result = upload(repo_id, operations, **kwargs)
        for name, content in hub.files[repo_id].items():
            path = folder / repo_id / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return result

    hub.create_commit = create_commit
    return hub


# Docstrings --------------------------------------------------------------------------------------------------------


def _modules() -> Iterator[ModuleType]:
    for module in pkgutil.walk_packages(epmvg_hf.__path__, "epmvg_hf."):
        yield importlib.import_module(module.name)
    yield epmvg_hf


def _documented() -> Iterator[tuple[str, object]]:
    """All functions, classes and methods of the package, by their names without that of the package."""
    for module in _modules():
        prefix = module.__name__.removeprefix("epmvg_hf").removeprefix(".")
        for name, value in vars(module).items():
            if not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__ != module.__name__:
                continue
            yield f"{prefix}.{name}".removeprefix("."), value
            if inspect.isclass(value):
                for method, function in _methods(value):
                    yield f"{prefix}.{name}.{method}", function


def _methods(cls: type) -> Iterator[tuple[str, object]]:
    kinds = (classmethod, staticmethod, property, cached_property)
    for name, value in vars(cls).items():
        if inspect.isfunction(value) or isinstance(value, kinds):
            yield name, value


def _has_example(value: object) -> bool:
    return re.search(r"^ *Example:\n\n *```python\n *>>> ", value.__doc__ or "", re.MULTILINE) is not None


DOCUMENTED = dict(_documented())
EXAMPLES = [name for name, value in DOCUMENTED.items() if ">>> " in (value.__doc__ or "")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, published):
    text = re.sub(r"^\s*```.*$", "", DOCUMENTED[name].__doc__, flags=re.MULTILINE)  # fences are no output
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    code = "".join(line.source for line in example.examples)
    example.globs.update({given: make() for given, make in AT_HAND.items() if re.search(rf"\b{given}\b", code)})
    assert any(line.want for line in example.examples), "the example shows nothing that comes out"
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(example, out=report.write).failed == 0, report.getvalue()


def test_no_code_block_goes_unrun():
    """Blocks without prompts would not be run."""
    blocks = [name for name, value in DOCUMENTED.items() if "```python" in (value.__doc__ or "")]
    assert blocks == EXAMPLES


def _public_methods(cls: type) -> Iterator[tuple[type, str, object]]:
    """The methods that the package defines and a user calls, each with the class that defines it."""
    for owner in cls.__mro__:
        if owner.__module__.startswith("epmvg_hf."):
            for method, function in _methods(owner):
                if not method.startswith("_") and method not in HOOKS.get(owner.__name__, ()):
                    yield owner, method, function


PUBLIC = {name: getattr(epmvg_hf, name) for name in epmvg_hf.__all__} | {
    f"{module}.{name}": DOCUMENTED[f"{module}.{name}"] for module, names in ALSO_PUBLIC.items() for name in names
}


def test_every_public_name_has_an_example():
    lacking = {name for name, value in PUBLIC.items() if not _has_example(value)}
    for name in epmvg_hf.__all__:
        for owner, method, _ in _public_methods(PUBLIC[name]) if inspect.isclass(PUBLIC[name]) else ():
            # An overriding method may leave the documentation to the method that it overrides, or the other way round.
            same = (vars(cls)[method] for cls in PUBLIC[name].__mro__ if method in vars(cls))
            if not any(_has_example(other) for other in same):
                lacking.add(f"{owner.__name__}.{method}")
    assert lacking == set()


def test_hooks_are_those_of_a_library():
    for name in HOOKS:
        (cls,) = (value for qualified, value in DOCUMENTED.items() if qualified.endswith(f".{name}"))
        assert HOOKS[name] <= vars(cls).keys()


def test_nothing_public_is_without_words():
    """This includes internal functions. A method that overrides another one may rely on its docstring."""
    without = set()
    for name, value in DOCUMENTED.items():
        owner, _, own = name.rpartition(".")
        bases = DOCUMENTED[owner].__mro__[1:] if owner in DOCUMENTED else ()
        overrides = any(own in vars(base) for base in bases)
        if not own.startswith("_") and not overrides and not (value.__doc__ or "").strip():
            without.add(name)
    assert without == set()


def _parameters(value: object) -> list[str]:
    """The arguments that the docstring of a class, function or method has to describe."""
    if dataclasses.is_dataclass(value):
        names = list(vars(value).get("__annotations__", ()))
    elif inspect.isclass(value) and "__init__" not in vars(value):
        names = []
    else:
        called = value.__init__ if inspect.isclass(value) else value
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [name for name, given in inspect.signature(called).parameters.items() if given.kind not in variable]
    return [name for name in names if name != "self" and not name.startswith("_")]


def test_every_parameter_of_what_is_public_is_described():
    described = dict(PUBLIC)
    for cls in filter(inspect.isclass, PUBLIC.values()):
        for owner, method, function in _public_methods(cls):
            if _has_example(function) and callable(getattr(cls, method)):
                described[f"{owner.__name__}.{method}"] = getattr(cls, method)
    lacking = {
        f"{name}: {parameter}"
        for name, value in described.items()
        for parameter in _parameters(value)
        if not re.search(rf"\b{parameter}\b", value.__doc__)
    }
    assert lacking == set()


def test_what_docstrings_name_is_there():
    """`[`~module.name`]` and `[`~Class.method`]` in docstrings."""
    unknown = []
    for where, value in DOCUMENTED.items():
        for owner, name in re.findall(r"\[`~(\w+)\.(\w+)`\]", value.__doc__ or ""):
            in_module = any(qualified.endswith(f".{owner}.{name}") for qualified in DOCUMENTED)
            classes = [found for qualified, found in DOCUMENTED.items() if qualified.endswith(f".{owner}")]
            if not in_module and not any(hasattr(found, name) for found in classes):
                unknown.append(f"{owner}.{name} in {where}")
    assert unknown == []


# Markdown ----------------------------------------------------------------------------------------------------------


def _run_blocks(markdown: str, values: dict[str, object]) -> Iterator[str]:
    """Runs the Python blocks one after the other in one namespace, and stops after each."""
    for block in re.finditer(r"^```python\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        line = markdown.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], "a page", "exec"), values)
        yield block[1]


# For each page, its Python blocks in their order: a part of the block, and what must be true once it has run.
README_BLOCKS = {
    "grounder(": "len(results) == 2 and set(result['box']) == {'xmin', 'ymin', 'xmax', 'ymax'}",
    "teacher=ClipTeacher": "trainer.state.global_step == 3 and trainer.teacher.embed_dim == 128",
    'load_grounding_dataset("refcoco"': "dataset[0]['expression'] == 'in testA'",
    "push_to_hub": "model.name_or_path == 'outputs/distilled'",
    "trust_remote_code": "type(model).__name__ == 'EpmVGForVisualGrounding'",
}
GUIDE_BLOCKS = {
    "model(**inputs)": "len(outputs.pred_boxes) == 2 and result['box'].shape == (4,)",
    "seen = {": "len(boxes) == 2 and boxes[1]['box'].allclose(result['box'], atol=1e-4)",  # as from the block before
    "rows = (": "result['text'] == 'the third object from the left' and len(result['box']) == 4",
    "optimize_for_inference": "len(outputs.pred_boxes) == 2 and not fast.training",
    "TorchAoConfig(": "'Int8' in type(quantized.model.text_projection.weight).__name__",
    "trainer.train()": "trainer.state.global_step == 3 and 'eval_acc@0.5' in trainer.state.log_history[-1]",
    "from_vision_text_pretrained": "processor.max_text_length == model.config.max_text_length == 40",
    "LoraConfig": "0 < model.num_parameters(only_trainable=True) < model.num_parameters() / 4",
    "ClipTeacher": "trainer.teacher is teacher and trainer.caption_dataset is captions",
    'load_grounding_dataset("refcoco"': "dataset[0]['expression'] == 'in testA'",
    "as_grounding_dataset(": "next(iter(train))['expression'] == 'a star'",
    "with_transform(": "train[0]['image'].mode == 'L'",
}


def _check_page(name: str, values: dict[str, object], expected: dict[str, str]) -> None:
    blocks = _run_blocks((ROOT / name).read_text(), values)
    for block, (part, condition) in zip(blocks, expected.items(), strict=True):
        assert part in block
        assert eval(condition, values), block


def test_readme(published):
    _check_page("README.md", {}, README_BLOCKS)
    assert set(published.files) == {"me/distilled", "me/my-epmvg"}


def test_guide():
    values = {"dataset": _shapes(), "captions": _shapes().remove_columns("box")}
    _check_page("examples/README.md", values, GUIDE_BLOCKS)


def test_arguments_of_the_trainer():
    values = {"dataset": _shapes(), "processor": tiny_processor()}
    _check_page("examples/TRAINER.md", values, {"model_init=": "trainer.train().global_step == 3"})


def test_smaller_pictures():
    _check_page("examples/images/README.md", {}, {"thumbnail": "small.size == (480, 320)"})


def test_card_of_the_model_for_photos():
    blocks = {
        "grounder(": "grounder.model.config.score_head",
        "parameter.data.zero_()": "EpmVGForVisualGrounding.from_pretrained('outputs/one_look').config.box_refinement",
    }
    _check_page("model_cards/epmvg-small-flickr30k/README.md", {}, blocks)


@pytest.mark.parametrize("name", ["clip-tiny-shapes", "of a model"])
def test_model_card(name):
    if name == "of a model":
        text = general_card("demo", "outputs/demo", with_code=True).text
    else:
        text = (ROOT / "model_cards" / name / "README.md").read_text()
    values = {}
    assert list(_run_blocks(text, values))
    assert len(values["boxes"]) == 2 if name == "of a model" else values["teacher"].embed_dim == 128


def test_no_python_block_of_a_page_goes_unrun():
    pages = {page_name(page) for page in PAGES if code_blocks(page, "python")}
    cards = {f"model_cards/{name}/README.md" for name in ("clip-tiny-shapes", "epmvg-small-flickr30k")}
    assert pages == {"README.md", "examples/README.md", "examples/TRAINER.md", *cards}


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_rows_of_own_data_are_read(tmp_path, page):
    (block,) = code_blocks(ROOT / page, "json")
    rows = [json.loads(line) for line in block.splitlines()]
    (tmp_path / "images").mkdir()
    for row in rows:
        Image.new("RGB", (640, 480)).save(tmp_path / row["image"])
    (tmp_path / "train.jsonl").write_text(block)
    dataset = load_grounding_dataset("custom", data_dir=tmp_path, box_format="xyxy")
    assert dataset["image_id"][:] == sorted(dataset["image_id"]) and dataset[0]["box"] == rows[0]["box"]
    assert {rows[0]["expression"], *rows[1]["expression"]} <= {*dataset["expression"]}


# The commands that end within seconds, by their beginnings, with their exit status and a part of what they print. The
# folder has a few rows of RefCOCO instead of the official number, for which the status is 1.
SHORT_COMMANDS = {
    "epmvg ground": (0, "the woman in the orange suit"),
    "epmvg check-data refcoco": (1, "found (official)"),
    "epmvg check-data custom": (0, "| train | custom | 2 |"),
    "epmvg exclude-images": (0, ""),
    "epmvg convert": (0, ""),
}


@pytest.mark.parametrize("beginning", SHORT_COMMANDS)
def test_command(beginning):
    status, printed = SHORT_COMMANDS[beginning]
    found = {" ".join(words): words for page in PAGES for words in commands(page)}
    chosen = [words for command, words in found.items() if command.startswith(beginning)]
    assert chosen
    for words in chosen:
        result = CliRunner().invoke(cli.app, words[1:])
        assert result.exit_code == status and printed in result.output, result.output
