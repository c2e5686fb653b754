import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import run_grounding as example
import torch
from command_line import parse_arguments
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline
from transformers.trainer_utils import PredictionOutput

from epmvg_hf import EpmVGForVisualGrounding, EpmVGTrainer, confirm_boxes, load_grounding_dataset
from epmvg_hf.evaluation.accuracy_by_group import GroupAccuracy
from tests.fixtures.models import tiny_model
from tests.fixtures.paths import EXAMPLES
from tests.fixtures.tiny_teacher import TinyTeacher
from tests.fixtures.towers import save_text_tower, save_vision_tower


def _environment(tmp_path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("config", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(config, tmp_path):
    parse_arguments(example.ARGUMENTS, "", config, ["--output_dir", str(tmp_path)])


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
    assert [(line["expression"], line["true_box"]) for line in lines] == [
        (row["expression"], row["box"]) for row in rows.select(range(40))
    ]
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


def test_a_saved_model_without_projections_can_be_distilled_into(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = example.ModelArguments(model_name_or_path=str(tmp_path))
    assert example.make_model(arguments, [], None)[0].config.teacher_projection_dim is None
    model, _ = example.make_model(arguments, [], 24)
    assert model.model.teacher_image_projection.out_features == 24


def test_the_first_images_keep_their_boxes_and_the_others_lose_them():
    dataset = load_grounding_dataset("shapes", split="train", num_images=5)
    labelled, captioned = example.split_labelled(dataset, 2)
    assert list(dict.fromkeys(labelled["image_id"])) == list(dict.fromkeys(dataset["image_id"]))[:2]
    assert len(labelled) + len(captioned) == len(dataset) and "box" not in captioned.column_names
    assert example.split_labelled(dataset, None) == (dataset, None)
    with pytest.raises(ValueError, match="expected 1 to 4 of the 5 images"):
        example.split_labelled(dataset, 5)


def test_a_teacher_draws_the_boxes_of_a_first_stage(tmp_path, monkeypatch):
    """No box of the data is read, and those that the teacher draws are trained on."""
    seen = []

    class Trainer(EpmVGTrainer):
        def train(self, *args, **kwargs):
            seen.append(self.train_dataset)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(example, "EpmVGTrainer", Trainer)
    monkeypatch.setattr(example.ClipTeacher, "from_pretrained", lambda *args: TinyTeacher())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    command = [
        "--output_dir", str(tmp_path / "out"), "--num_train_images", "8", "--max_steps", "2", "--do_eval", "false",
        "--do_predict", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu", "true",
        "--num_labelled_images", "0", "--teacher_boxes", "true", "--teacher_map_loss_coefficient", "0", *UNCALIBRATED,
    ]  # fmt: skip
    example.main(command)
    (train,) = seen
    true = load_grounding_dataset("shapes", split="train", num_images=8, absent_per_image=2)
    true = {(row["image_id"], row["expression"]): row["box"] for row in true if row["box"] is not None}
    assert len(train) == len(true)
    assert sum(true[row["image_id"], row["expression"]] == row["box"] for row in train) == 0
    assert EpmVGForVisualGrounding.from_pretrained(tmp_path / "out").config.box_head == "map"
    with pytest.raises(ValueError, match="teacher_boxes is true, but there is no teacher"):
        example.main([*command, "--teacher_name", "none", "--output_dir", str(tmp_path / "other")])


def test_boxes_of_a_model_that_the_teacher_confirms_are_learned(tmp_path, processor, monkeypatch, caplog):
    tiny_model(box_head="map").save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    kept = []

    def confirm(dataset, boxes, teacher):
        kept.append(confirm_boxes(dataset, boxes, teacher, min_iou=0.1, cache_dir=tmp_path / "cache"))
        return kept[-1]

    monkeypatch.setattr(example, "confirm_boxes", confirm)
    monkeypatch.setattr(example.ClipTeacher, "from_pretrained", lambda *args: TinyTeacher())
    command = [
        "--output_dir", str(tmp_path / "out"), "--num_train_images", "8", "--max_steps", "2", "--do_eval", "false",
        "--do_predict", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu", "true",
        "--confirmed_model", str(tmp_path / "model"), *UNCALIBRATED,
    ]  # fmt: skip
    example.main([*command, "--num_labelled_images", "2"])
    (confirmed,) = kept
    assert len(confirmed) > 0 and len(set(confirmed["image_id"])) <= 6
    assert f"expressions without a box, the teacher confirms {len(confirmed)} boxes" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"and on {len(confirmed)} expressions or captions with boxes that a model drew" in card
    with pytest.raises(ValueError, match="confirmed_model needs num_labelled_images"):
        example.main([*command, "--output_dir", str(tmp_path / "other")])


def test_expressions_that_describe_nothing_are_no_captions():
    dataset = load_grounding_dataset("shapes", split="train", num_images=5, absent_per_image=2)
    labelled, captioned = example.split_labelled(dataset, 2)
    assert sum(labelled["absent"]) == 2 * 2
    assert not any(captioned["absent"]) and len(captioned) == len(dataset) - len(labelled) - 3 * 2


def test_accuracy_by_kind_starts_with_the_worst_and_leaves_out_rows_without_a_box():
    box, other = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    rows = [("size", box, box), ("relation", box, other), ("relation", box, box), ("size", None, other)]
    kinds, true_boxes, predictions = map(list, zip(*rows, strict=True))
    dataset = Dataset.from_dict({"kind": kinds, "box": true_boxes})
    expected = [GroupAccuracy("relation", 2, 0.5), GroupAccuracy("size", 1, 1.0)]
    assert example.accuracy_by_kind(dataset, np.array(predictions)) == expected
    assert example.accuracy_by_kind(dataset.remove_columns("kind"), np.array(predictions)) == []


def test_pictures_show_expressions_with_a_box_and_the_file_has_all(tmp_path, monkeypatch):
    dataset = load_grounding_dataset("shapes", split="test", num_images=4, absent_per_image=2)
    drawn = []
    monkeypatch.setattr(example, "draw_grid", lambda file, **parts: drawn.append(parts))
    output = PredictionOutput(np.tile(np.float32([1, 2, 3, 4]), (len(dataset), 1)), None, None)
    example.write_predictions(tmp_path, dataset, output, picture_rows=100)
    with_box = [row["expression"] for row in dataset if row["box"] is not None]
    assert drawn[0]["expressions"] == with_box and len(with_box) == len(dataset) - 8
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == len(dataset)


def test_scenes_get_their_own_absent_expressions_in_all_splits(tmp_path, capsys):
    output = tmp_path / "out"
    example.main([
        *UNCALIBRATED, "--teacher_name", "none", "--output_dir", str(output),
        "--absent_per_image", "2", "--num_train_images", "4", "--max_eval_rows", "20", "--max_steps", "1",
        "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--bf16", "false",
        "--use_cpu", "true",
    ])  # fmt: skip
    rows = load_grounding_dataset("shapes", split="test", num_images=3, absent_per_image=2).select(range(20))
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [(line["expression"], line["true_box"]) for line in lines] == [
        (row["expression"], row["box"]) for row in rows
    ]
    assert None in rows["box"][:]
    results = json.loads((output / "all_results.json").read_text())
    assert {"eval_presence_auroc", "test_presence_auroc"} <= set(results)
    with_box = Counter(row["kind"] for row in rows if row["box"] is not None)
    printed = capsys.readouterr().out
    assert all(f"of {count} expressions of the kind {kind}" in printed for kind, count in with_box.items())


def test_towers_and_texts_are_for_new_models_only(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    arguments = example.ModelArguments(model_name_or_path=str(tmp_path), max_text_length=64)
    with pytest.raises(ValueError, match="a saved model has its own max_text_length"):
        example.make_model(arguments, [], None)
    with pytest.raises(ValueError, match="must be given together"):
        example.make_model(example.ModelArguments(vision_name_or_path=str(tmp_path)), [], None)


def test_a_new_model_takes_towers_and_keeps_the_other_settings(tmp_path):
    vision, text = save_vision_tower("swin", tmp_path / "swin"), save_text_tower("roberta", tmp_path / "roberta")
    arguments = example.ModelArguments(
        config_name="tiny.json", vision_name_or_path=vision, text_name_or_path=text, image_size=48,
        attn_implementation="eager",
    )  # fmt: skip
    model, processor = example.make_model(arguments, [], 24)
    config = model.config
    assert (config.backbone_config.model_type, config.text_config.model_type) == ("swin", "roberta")
    assert (config.d_model, config.box_head, config.image_size, config.backbone_stride) == (128, "map", 48, 8)
    assert config._attn_implementation == config.text_config._attn_implementation == "eager"
    assert model.model.teacher_image_projection.out_features == 24
    assert type(processor.tokenizer).__name__ == "RobertaTokenizer" and processor.max_text_length == 20


def test_an_adapter_for_a_saved_model(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    output = tmp_path / "out"
    example.main([
        "--model_name_or_path", str(tmp_path / "base"), "--lora_rank", "2", "--teacher_name", "none",
        "--lora_target_modules", r".*(encoder\.layers|text_model).*\.(q_proj|query)", "--output_dir", str(output),
        "--num_train_images", "4", "--max_eval_rows", "8", "--max_steps", "1", "--eval_strategy", "no",
        "--save_strategy", "no", "--load_best_model_at_end", "false", "--bf16", "false", "--use_cpu", "true",
        *UNCALIBRATED,
    ])  # fmt: skip
    saved = load_file(output / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 and not (output / "model.safetensors").exists()
    assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} == {2}
    boxes = [json.loads(line)["box"] for line in (output / "predictions.jsonl").read_text().splitlines()]
    row = load_grounding_dataset("shapes", split="test", num_images=1)[0]
    found = pipeline("visual-grounding", model=str(output))(row["image"], row["expression"])["box"]
    assert list(found.values()) == pytest.approx(boxes[0], abs=1e-3)
    assert "of which only the 128 of the adapter were trained" in (output / "README.md").read_text()


def test_an_adapter_needs_a_saved_base_model(tmp_path, processor):
    with pytest.raises(ValueError, match="lora_rank needs model_name_or_path"):
        example.make_model(example.ModelArguments(lora_rank=2), [], None)
    tiny_model(box_head="map").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = example.ModelArguments(model_name_or_path=str(tmp_path), lora_rank=2)
    assert example.make_model(arguments, [], None)[0].config.teacher_projection_dim is None
    with pytest.raises(ValueError, match=f"fits {tmp_path} without the projections that the relation and feature"):
        example.make_model(arguments, [], 24)
    arguments.image_size, arguments.box_refinement = 96, True
    with pytest.raises(ValueError, match=f"fits {tmp_path} without box_refinement True, image_size 96"):
        example.make_model(arguments, [], None)


def test_scores_that_cannot_be_calibrated_are_an_error_before_a_model_is_trained(tmp_path, processor):
    tiny_model(box_head="map").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    command = ["--model_name_or_path", str(tmp_path), "--num_train_images", "4", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="calibrate_scores is true, but the model has no score_head"):
        example.main(command)
    without = ["--do_eval", "false", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    with pytest.raises(ValueError, match="calibrate_scores needs do_eval, which gives the rows for it"):
        example.main([*command, *without])


def test_a_saved_model_gets_another_canvas_and_new_parts(tmp_path, processor):
    saved = tiny_model(box_head="map")
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = example.ModelArguments(model_name_or_path=str(tmp_path), image_size=96, box_refinement=True)
    model, resized = example.make_model(arguments, [], None)
    assert model.config.image_size == 96 and resized.image_processor.size == {"height": 96, "width": 96}
    assert model.box_refinement.correction.weight.abs().sum() == 0
    assert torch.equal(model.box_head[0].weight, saved.box_head[0].weight)
    # A processor that was saved with another canvas than the model's gets the one that is asked for, too.
    resized.save_pretrained(tmp_path)
    arguments.image_size = saved.config.image_size
    model, resized = example.make_model(arguments, [], None)
    assert model.config.image_size == resized.image_processor.size["height"] == 64
