"""Two optimizer steps of every recipe, on benchmarks of a few rows in their original file formats."""

import json
from pathlib import Path

import pytest
import run_grounding
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from epmvg_hf import EpmVGConfig, EpmVGProcessor
from epmvg_hf.data.benchmarks import BENCHMARKS
from tests.fixtures import flickr30k_files, refer_files, referit_files
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
    """Each benchmark's folder, with a few rows of training and validation."""
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


def _train(recipe: str, folder: Path, data_dir: Path, vision: str, text: str, *further: str) -> list[dict]:
    """Runs the recipe with tiny towers for two steps; what it logged."""
    run_grounding.main([
        str(EXAMPLES / "configs" / f"{recipe}.yaml"), "--data_dir", str(data_dir), "--output_dir", str(folder),
        "--vision_name_or_path", vision, "--text_name_or_path", text, "--image_size", "64", "--max_steps", "2",
        "--logging_steps", "1", "--dataloader_num_workers", "0", "--dataloader_pin_memory", "false",
        "--use_cpu", "true", "--disable_tqdm", "true", *further,
    ])  # fmt: skip
    return json.loads((folder / "trainer_state.json").read_text())


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(run_grounding, "use_all_cores", lambda arguments: None)


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

    # The towers went in: the first stage of the backbone is never trained, and so still that of the folder.
    saved, tower = load_file(tmp_path / "model.safetensors"), load_file(Path(towers["detr"]) / "model.safetensors")
    stem = "embedder.embedder.convolution.weight"
    original = next(value for key, value in tower.items() if key.endswith(stem))
    assert saved[f"model.vision_model.{stem}"].equal(original)
    config = EpmVGConfig.from_pretrained(tmp_path)
    assert config.box_head == ("map" if kind == "student" else "reg")
    assert (config.encoder_layers, config.fusion_layers, config.fusion_ffn_dim) == (2, 6, 2048)
    assert EpmVGProcessor.from_pretrained(tmp_path).image_processor.size == {"height": 64, "width": 64}


def test_two_steps_of_clip_vg(tmp_path, data, towers):
    """Frozen towers and four levels: of the towers, the vision tower's positions alone are trained."""
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


def test_every_recipe_is_run_here_and_says_what_was_published():
    for benchmark, name in BENCHMARK_OF.items():
        for recipe in (benchmark, f"transvg_{benchmark}"):
            text = (EXAMPLES / "configs" / f"{recipe}.yaml").read_text()
            assert yaml.safe_load(text)["dataset_name"] == name
            assert "none of it measured by us" in text and "TransVG, ResNet-101 (its paper)" in text
    assert set(BENCHMARK_OF.values()) == set(BENCHMARKS)


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
    """Read as `accelerate launch` reads them: an unknown key is an error there."""
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
    # And merged with the command line, where it says what kind of launch it is.
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    assert arguments.use_fsdp == (kind == DistributedType.FSDP)
    assert arguments.use_deepspeed == (kind == DistributedType.DEEPSPEED)
    assert arguments.mixed_precision == "no"
