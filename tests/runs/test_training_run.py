import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from epmvg_hf import ClipTeacher, EpmVGForVisualGrounding, EpmVGTrainer, confirm_boxes, load_grounding_dataset
from epmvg_hf.runs import training_rows, training_run
from epmvg_hf.runs.arguments import ARGUMENTS
from epmvg_hf.runs.command_line import parse_arguments
from epmvg_hf.runs.training_run import parse, run_training
from tests.fixtures.models import tiny_model
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.tiny_teacher import TinyTeacher


def _environment(tmp_path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}


def _train(*flags: str) -> None:
    run_training(*parse([str(EXAMPLES / "configs" / "shapes.yaml"), *flags]))


@pytest.mark.parametrize("config", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(config, tmp_path):
    parse_arguments(ARGUMENTS, "", [str(config), "--output_dir", str(tmp_path)])


# A model of a few steps may have no right box, by which scores could be calibrated.
UNCALIBRATED = ("--calibrate_scores", "false")


def test_main_job_and_prediction(tmp_path):
    """The command of the README: train, evaluate and draw. Then boxes for one image from the saved folder."""
    output = tmp_path / "out"
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", str(EXAMPLES / "run_grounding.py"),
        "--output_dir", str(output), "--num_train_images", "24", "--max_eval_rows", "40", "--num_train_epochs", "1",
        "--attn_implementation", "sdpa",
        "--eval_steps", "2", "--save_steps", "2", "--picture_rows", "3", "--bf16", "false", "--use_cpu", "true",
        "--num_labelled_images", "16", "--logging_steps", "1", "--relation_loss_coefficient", "1",
        "--feature_loss_coefficient", "1", *UNCALIBRATED,
    ]  # fmt: skip
    result = subprocess.run(
        command, env=_environment(tmp_path), cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for name in (
        "this model",
        "blind: whole image",
        "blind: best constant box",
        "blind: best box per expression",
        "of the kind relation",
        ", the worst\n",
    ):
        assert name in result.stdout

    # It distils from the embedded teacher, also with images without boxes, and saves the student alone.
    logs = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert {"loss_relation", "loss_feature", "loss_teacher_map", "loss_bbox", "loss_score"} <= set(logs[0])
    saved = {name.split(".")[0] for name in load_file(output / "model.safetensors")}
    assert saved == {"model", "box_head", "log_map_sharpness", "box_refinement", "score_head"}

    results = json.loads((output / "all_results.json").read_text())
    assert {"train_loss", "eval_acc@0.5", "test_acc@0.5", "test_blind_best_box_per_expression"} <= set(results)
    assert {f"test_acc@0.5_{kind}" for kind in ("attribute", "size", "extreme", "ordinal", "relation")} <= set(results)
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    rows = load_grounding_dataset("shapes", split="test", num_images=10, absent_per_image=2)
    assert sorted((line["expression"], line["true_box"]) for line in lines) == sorted(
        (row["expression"], row["box"]) for row in rows.select(range(40))
    )
    assert Image.open(output / "predictions.png").size[0] > 500
    assert EpmVGForVisualGrounding.from_pretrained(output).config.box_head == "map"

    card = ModelCard.load(output / "README.md")
    assert card.data.datasets == ["shapes"] and card.data.language == "en" and len(card.data.eval_results) == 6
    assert "python examples/run_grounding.py --output_dir out " in card.text
    assert "from local-dir:clip-tiny-shapes of 128 dimensions" in card.text

    rows[0]["image"].save(tmp_path / "scene.png")
    command = [
        sys.executable, "-m", "epmvg_hf", "ground", str(tmp_path / "scene.png"), "the circle", "the star",
        "--model", str(output), "--save", str(tmp_path / "prediction.png"),
    ]  # fmt: skip
    result = subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = [line.split(": ") for line in result.stdout.splitlines()]
    assert [text for _, text, _ in printed] == ["the circle", "the star"]
    for _, _, box in printed:
        x1, y1, x2, y2 = json.loads(box.split("(")[0])
        assert 0 <= x1 <= x2 <= rows[0]["image"].width and 0 <= y1 <= y2 <= rows[0]["image"].height
    assert Image.open(tmp_path / "prediction.png").size == rows[0]["image"].size


def test_a_teacher_draws_the_boxes_of_a_first_stage(tmp_path, monkeypatch):
    """No box of the data is read, and those that the teacher draws are trained on."""
    seen = []

    class Trainer(EpmVGTrainer):
        def train(self, *args, **kwargs):
            seen.append(self.train_dataset)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(training_run, "EpmVGTrainer", Trainer)
    monkeypatch.setattr(ClipTeacher, "from_pretrained", lambda *args: TinyTeacher())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    command = [
        "--output_dir", str(tmp_path / "out"), "--num_train_images", "8", "--max_steps", "2", "--do_eval", "false",
        "--do_predict", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu", "true",
        "--num_labelled_images", "0", "--teacher_boxes", "true", "--teacher_map_loss_coefficient", "0", *UNCALIBRATED,
    ]  # fmt: skip
    _train(*command)
    (train,) = seen
    true = load_grounding_dataset("shapes", split="train", num_images=8, absent_per_image=2)
    true = {(row["image_id"], row["expression"]): row["box"] for row in true if row["box"] is not None}
    assert len(train) == len(true)
    assert sum(true[row["image_id"], row["expression"]] == row["box"] for row in train) == 0
    assert EpmVGForVisualGrounding.from_pretrained(tmp_path / "out").config.box_head == "map"
    with pytest.raises(ValueError, match="teacher_boxes is true, but there is no teacher"):
        _train(*command, "--teacher_name", "none", "--output_dir", str(tmp_path / "other"))


def test_boxes_of_a_model_that_the_teacher_confirms_are_learned(tmp_path, processor, monkeypatch, caplog):
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    kept = []

    def confirm(dataset, boxes, teacher):
        kept.append(confirm_boxes(dataset, boxes, teacher, min_iou=0.1, cache_dir=tmp_path / "cache"))
        return kept[-1]

    monkeypatch.setattr(training_rows, "confirm_boxes", confirm)
    monkeypatch.setattr(ClipTeacher, "from_pretrained", lambda *args: TinyTeacher())
    command = [
        "--output_dir", str(tmp_path / "out"), "--num_train_images", "8", "--max_steps", "2", "--do_eval", "false",
        "--do_predict", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu", "true",
        "--confirmed_model", str(tmp_path / "model"), *UNCALIBRATED,
    ]  # fmt: skip
    _train(*command, "--num_labelled_images", "2")
    (confirmed,) = kept
    assert len(confirmed) > 0 and len(set(confirmed["image_id"])) <= 6
    assert f"expressions without a box, the teacher confirms {len(confirmed)} boxes" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"and on {len(confirmed)} expressions or captions with boxes that a model drew" in card
    with pytest.raises(ValueError, match="confirmed_model needs num_labelled_images"):
        _train(*command, "--output_dir", str(tmp_path / "other"))


def test_scenes_get_their_own_absent_expressions_in_all_splits(tmp_path, capsys):
    output = tmp_path / "out"
    _train(
        *UNCALIBRATED, "--teacher_name", "none", "--output_dir", str(output),
        "--absent_per_image", "2", "--num_train_images", "4", "--max_eval_rows", "20", "--max_steps", "1",
        "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--bf16", "false",
        "--use_cpu", "true",
    )  # fmt: skip
    rows = load_grounding_dataset("shapes", split="test", num_images=3, absent_per_image=2).select(range(20))
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert sorted((line["expression"], line["true_box"] or []) for line in lines) == sorted(
        (row["expression"], row["box"] or []) for row in rows
    )
    assert None in rows["box"][:]
    results = json.loads((output / "all_results.json").read_text())
    assert {"eval_presence_auroc", "test_presence_auroc"} <= set(results)
    with_box = Counter(row["kind"] for row in rows if row["box"] is not None)
    printed = capsys.readouterr().out
    assert all(f"of {count} expressions of the kind {kind}" in printed for kind, count in with_box.items())


def test_an_adapter_for_a_saved_model(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    output = tmp_path / "out"
    _train(
        "--model_name_or_path", str(tmp_path / "base"), "--lora_rank", "2", "--teacher_name", "none",
        "--lora_target_modules", r".*(encoder\.layers|text_model).*\.(q_proj|query)", "--output_dir", str(output),
        "--num_train_images", "4", "--max_eval_rows", "8", "--max_steps", "1", "--eval_strategy", "no",
        "--save_strategy", "no", "--load_best_model_at_end", "false", "--bf16", "false", "--use_cpu", "true",
        *UNCALIBRATED,
    )  # fmt: skip
    saved = load_file(output / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 and not (output / "model.safetensors").exists()
    assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} == {2}
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    row = load_grounding_dataset("shapes", split="test", num_images=1)[0]
    found = pipeline("visual-grounding", model=str(output))(row["image"], row["expression"])["box"]
    names = [(line["image_id"], line["expression"]) for line in lines]
    assert list(found.values()) == pytest.approx(
        lines[names.index((row["image_id"], row["expression"]))]["box"], abs=1e-3
    )
    assert "of which only the 128 of the adapter were trained" in (output / "README.md").read_text()


def test_scores_that_cannot_be_calibrated_are_an_error_before_a_model_is_trained(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    command = ["--model_name_or_path", str(tmp_path), "--num_train_images", "4", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="calibrate_scores is true, but the model has no score_head"):
        _train(*command)
    without = ["--do_eval", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    with pytest.raises(ValueError, match="calibrate_scores needs do_eval, which gives the rows for it"):
        _train(*command, *without)
