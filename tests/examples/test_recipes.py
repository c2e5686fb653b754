"""Every recipe runs for two optimizer steps, on benchmarks of a few rows in their original file formats."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from epmvg_hf import EpmVGConfig, EpmVGProcessor, load_grounding_dataset
from epmvg_hf.data.benchmarks import BENCHMARKS
from epmvg_hf.runs import training_run
from epmvg_hf.runs.training_run import parse, run_training
from tests.fixtures import flickr30k_files, refer_files, referit_files
from tests.fixtures.models import tiny_model, tiny_processor
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.towers import save_clip, save_text_tower, save_vision_tower

TEACHER = EXAMPLES.parent / "model_cards" / "clip-tiny-shapes"
BENCHMARK_OF = {
    "refcoco": "refcoco",
    "refcoco_plus": "refcoco+",
    "refcocog": "refcocog",
    "referitgame": "referitgame",
    "flickr30k": "flickr30k_entities",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """The folder of each benchmark, with a few rows for training and validation."""
    root = tmp_path_factory.mktemp("data")
    refer = {
        name: refer_files.write(root / name, name=name, split_by=split_by)
        for name, split_by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
    }
    return refer | {
        "referitgame": referit_files.write(root / "referitgame"),
        "flickr30k_entities": flickr30k_files.write(root / "flickr30k_entities"),
    }


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("towers")
    return {
        "detr": save_vision_tower("detr", root / "detr"),
        "bert": save_text_tower("bert", root / "bert"),
        "clip": save_clip(root / "clip", layers=12, positions=77),
    }


def _train(recipe: str, folder: Path, data_dir: Path, vision: str, text: str, *further: str) -> dict:
    """Run the recipe with tiny towers for two steps, and return what it logged."""
    towers = ("--vision_name_or_path", vision, "--text_name_or_path", text)
    return _run_recipe(recipe, folder, data_dir, *towers, "--image_size", "64", *further)


def _run_recipe(recipe: str, folder: Path, data_dir: Path, *further: str) -> dict:
    """Run the recipe for two steps, and return what it logged."""
    run_training(*parse([
        str(EXAMPLES / "configs" / f"{recipe}.yaml"), "--data_dir", str(data_dir), "--output_dir", str(folder),
        "--max_steps", "2", "--logging_steps", "1", "--dataloader_num_workers", "0",
        "--dataloader_pin_memory", "false", "--use_cpu", "true", "--disable_tqdm", "true", *further,
    ]))  # fmt: skip
    return json.loads((folder / "trainer_state.json").read_text())


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(training_run, "use_hardware", lambda arguments: None)


@pytest.mark.parametrize("kind", ["student", "transvg"])
@pytest.mark.parametrize("benchmark", BENCHMARK_OF)
def test_two_steps(tmp_path, data, towers, benchmark, kind):
    name = BENCHMARK_OF[benchmark]
    further = ["--max_text_length", "20"]
    if kind == "student":
        further += ["--teacher_name", f"local-dir:{TEACHER}", "--teacher_pretrained", "none"]
    recipe = benchmark if kind == "student" else f"transvg_{benchmark}"
    state = _train(recipe, tmp_path, data[name], towers["detr"], towers["bert"], *further)

    assert state["global_step"] == 2 and state["best_metric"] is not None
    terms = {term for log in state["log_history"] for term in log if term.startswith("loss_")}
    of_the_student = {"loss_map", "loss_teacher_map"} if kind == "student" else set()
    assert terms == {"loss_bbox", "loss_giou"} | of_the_student
    assert "eval_acc@0.5" in json.loads((tmp_path / "all_results.json").read_text())

    # The towers were used: the first stage of the backbone is never trained, so it is still the one in their folder.
    saved, tower = load_file(tmp_path / "model.safetensors"), load_file(Path(towers["detr"]) / "model.safetensors")
    stem = "embedder.embedder.convolution.weight"
    original = next(value for key, value in tower.items() if key.endswith(stem))
    assert saved[f"model.vision_model.{stem}"].equal(original)
    config = EpmVGConfig.from_pretrained(tmp_path)
    assert config.box_head == ("map" if kind == "student" else "reg")
    assert (config.encoder_layers, config.fusion_layers, config.fusion_ffn_dim) == (2, 6, 2048)
    assert EpmVGProcessor.from_pretrained(tmp_path).image_processor.size == {"height": 64, "width": 64}

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "zero-shot-object-detection" and card.data.library_name == "transformers"
    assert card.data.language == "en" and len(card.data.datasets) == 1
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "mean_iou"}
    assert "pip install" in card.text and str(tmp_path) not in card.text


def test_two_steps_of_clip_vg(tmp_path, data, towers):
    """The towers are frozen except for the positions of the vision tower, and four of its layers are read."""
    short = ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
    _train("clip_vg_refcoco", tmp_path, data["refcoco"], towers["clip"], towers["clip"], *short)
    saved, tower = load_file(tmp_path / "model.safetensors"), load_file(Path(towers["clip"]) / "model.safetensors")
    changed = set()
    for part in ("vision_model", "text_model"):
        inner = "vision_model.tower" if part == "vision_model" else part
        for key, value in tower.items():
            ours = saved.get(key.replace(f"{part}.", f"model.{inner}.", 1))
            if key.startswith(part) and ours is not None and not ours.equal(value):
                changed.add(key)
    assert changed == {"vision_model.embeddings.position_embedding.weight"}
    assert saved["model.input_projection.weight"].shape[1] == 4 * 16


def test_two_steps_with_an_efficientnet(tmp_path, data, towers):
    """Two maps on the grid of the finer one, frozen first blocks, and absent expressions that teach the scores."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("tf_efficientnet_lite0"), tmp_path / "vision", safe_serialization=True)
    further = ["--max_text_length", "20", "--freeze_backbone_epochs", "0", "--warmup_steps", "0"]
    folder, images = tmp_path / "small", data["flickr30k_entities"]
    state = _train("flickr30k_towers", folder, images, str(tmp_path / "vision"), towers["bert"], *further)
    logs = [log for log in state["log_history"] if "loss_score" in log]
    assert logs and logs[0]["loss_score"] > 0
    config = EpmVGConfig.from_pretrained(folder)
    assert config.score_head and config.projection_norm and config.backbone_stride == 16
    saved, tower = load_file(folder / "model.safetensors"), load_file(tmp_path / "vision" / "model.safetensors")
    for block, trained in ((2, False), (3, True), (6, True)):
        key = f"blocks.{block}.0.conv_pw.weight"
        assert saved[f"model.vision_model._backbone.{key}"].equal(tower[key]) != trained

    # The second part of the recipe. A model of two steps may have no right box, by which scores could be calibrated.
    further = ["--model_name_or_path", str(folder), "--image_size", "96", "--calibrate_scores", "false"]
    _run_recipe("flickr30k_towers_320", tmp_path / "large", images, *further, "--warmup_steps", "0")
    config = EpmVGConfig.from_pretrained(tmp_path / "large")
    assert config.box_refinement and config.image_size == 96
    assert EpmVGProcessor.from_pretrained(tmp_path / "large").image_processor.size == {"height": 96, "width": 96}
    refined = load_file(tmp_path / "large" / "model.safetensors")
    assert refined["model.fusion_positions"].shape[0] == saved["model.fusion_positions"].shape[0] - 4 * 4 + 6 * 6
    assert refined["box_refinement.correction.weight"].abs().sum() > 0


def test_every_recipe_is_run_here_and_lists_published_figures():
    for benchmark, name in BENCHMARK_OF.items():
        for recipe in (benchmark, f"transvg_{benchmark}"):
            text = (EXAMPLES / "configs" / f"{recipe}.yaml").read_text()
            assert yaml.safe_load(text)["dataset_name"] == name
            assert "none of it measured by us" in text and "TransVG, ResNet-101 (its paper)" in text
    # What others publish for gRefCOCO is about sets of boxes, which this model does not give.
    assert {*BENCHMARK_OF.values(), "grefcoco"} == set(BENCHMARKS)


def test_two_steps_on_own_data(tmp_path):
    """The command of the README fine-tunes a saved model on a folder of images and JSON lines."""
    model = tiny_model(box_head="map")
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = load_grounding_dataset("shapes", split="validation", num_images=2)
    for split in ("train", "validation"):
        with (tmp_path / "data" / f"{split}.jsonl").open("w") as file:
            for row in rows:
                row["image"].save(tmp_path / "data" / f"{row['image_id']}.png")
                line = {"image": f"{row['image_id']}.png", "expression": row["expression"], "box": row["box"]}
                file.write(json.dumps(line) + "\n")
    output = tmp_path / "output"
    run_training(*parse([
        str(EXAMPLES / "configs" / "custom.yaml"), "--data_dir", str(tmp_path / "data"), "--use_cpu", "true",
        "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(output), "--max_steps", "2",
        "--warmup_steps", "0", "--disable_tqdm", "true",
    ]))  # fmt: skip
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["best_metric"] is not None
    saved = load_file(output / "model.safetensors")
    assert not saved["box_head.0.weight"].equal(model.state_dict()["box_head.0.weight"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one_gpu", DistributedType.NO),
        ("several_gpus", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_understands_its_configs(name, kind):
    """They are read as by `accelerate launch`, where an unknown key is an error."""
    file = EXAMPLES / "accelerate_configs" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == kind
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    for key in ("fsdp_config", "deepspeed_config"):
        unknown = {option for option in getattr(config, key) if option not in known}
        assert unknown == set()
    if kind == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == 2
    # Merged with a command line, they decide the kind of launch.
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    assert arguments.use_fsdp == (kind == DistributedType.FSDP)
    assert arguments.use_deepspeed == (kind == DistributedType.DEEPSPEED)
    assert arguments.mixed_precision == "no"
