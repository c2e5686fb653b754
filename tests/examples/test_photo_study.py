import json
from argparse import Namespace

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

import confirmed_boxes
import photo_report
import photos
import timm
from datasets import Dataset
from photos import Run
from timm.models import save_for_hf
from train_teacher import make_clip, save_teacher

from epmvg_hf import confirm_boxes, load_grounding_dataset
from tests.fixtures.models import tiny_tokenizer
from tests.fixtures.towers import save_text_tower

SETTINGS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
TEACHER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "timm_model_name": "test_efficientnet", "timm_proj": "linear"},
    "text_cfg": {
        "context_length": 12,
        "hf_model_name": "an/encoder",
        "hf_tokenizer_name": "an/encoder",
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
    },
}


def _photos(split: str) -> Dataset:
    """Eight scenes with two sentences each, each beside two expressions or more."""
    scenes = load_grounding_dataset("shapes", split="train" if split == "train" else "validation", num_images=8)
    sentences = [f"scene {row['image_id']}, part {index % 2}" for index, row in enumerate(scenes)]
    return scenes.add_column("sentence", sentences)


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> Namespace:
    monkeypatch.setattr(photos, "load_split", lambda arguments, split: _photos(split))
    monkeypatch.setattr(photos, "HELD_BACK", 3)
    monkeypatch.setattr(photos, "FIRST_BATCH_SIZE", 4)
    return Namespace(
        vision=str(tmp_path / "vision"),
        text=str(tmp_path / "text"),
        teacher=str(tmp_path / "teacher"),
        half="frozen",
        first_steps=2,
        teacher_box_steps=3,
        predictor_steps=2,
        evaluate_on="validation",
        output_dir=tmp_path / "study",
    )


def test_photos_that_are_held_back_are_neither_labelled_nor_captioned(arguments):
    train = _photos("train")
    arguments.evaluate_on = "held_back"
    held_back = set(photos.load_test(arguments)["image_id"])
    few, all_of_them = photos.load_labelled(arguments, 2, seed=0), photos.load_labelled(arguments, 99, seed=0)
    assert len(held_back) == 3 and set(all_of_them["image_id"]) == set(train["image_id"]) - held_back
    assert len(set(few["image_id"])) == 2 and set(few["image_id"]) < set(all_of_them["image_id"])
    captions = photos.load_captions(arguments)
    assert set(captions["image_id"]) == set(all_of_them["image_id"]) and set(captions["box"]) == {None}
    assert sorted(captions["expression"]) == sorted([*all_of_them["expression"], *set(all_of_them["sentence"])])
    # Caches of the teacher's outputs are found again by the fingerprint.
    assert photos.load_captions(arguments)._fingerprint == captions._fingerprint


@pytest.fixture
def towers(arguments, tmp_path, monkeypatch) -> Namespace:
    save_for_hf(timm.create_model("test_efficientnet", num_classes=3), tmp_path / "vision", safe_serialization=True)
    save_text_tower("bert", tmp_path / "text", positions=24)
    clip = make_clip(TEACHER, arguments.vision, arguments.text)
    # As if it had been trained.
    torch.nn.init.normal_(clip.visual.trunk.conv_stem.weight)
    save_teacher(clip, TEACHER, SETTINGS, tiny_tokenizer(), tmp_path / "teacher")
    config = json.loads(photos.CONFIG.read_text()) | {"out_features": ["blocks.3", "blocks.4"], "image_size": 64}
    config |= {"teacher_projection_dim": 16, "d_model": 16, "encoder_ffn_dim": 16, "fusion_ffn_dim": 16}
    monkeypatch.setattr(photos, "CONFIG", tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return arguments


def _check_predicted(run: Run) -> None:
    """Learned are the boxes of photos without labels: all, those that the teacher confirms, or the means of both."""
    rows, boxes = photos.rows_without_labels(run), np.load(run.predictions_file)
    # A student of two steps and a teacher of none agree on hardly any box.
    boxes[::2] = np.load(photos.drawn_file(run.arguments))[rows][::2]
    np.save(run.predictions_file, boxes)
    others = photos.load_phrases(run.arguments).select(rows)
    assert not set(others["image_id"]) & set(photos.load_labelled(run.arguments, 3, seed=0)["image_id"])
    expected, expected_boxes = others, boxes.tolist()
    if run.setting.confirmed:
        teacher = photos.ClipTeacher.from_pretrained(f"local-dir:{run.arguments.teacher}")
        expected = confirm_boxes(others, boxes, teacher, disable_tqdm=True)
        assert 0 < len(expected) < len(others)
        own = dict(zip(zip(others["image_id"], others["expression"], strict=True), boxes.tolist(), strict=True))
        rows = zip(expected["image_id"], expected["expression"], strict=True)
        expected_boxes = expected["box"][:] if run.setting.averaged else [own[row] for row in rows]
    predicted = photos.load_predicted(run)
    assert predicted["expression"][:] == expected["expression"][:]
    assert predicted["box"][:] == expected_boxes


def test_runs_write_results_from_which_the_report_is_made(towers, tmp_path, monkeypatch):
    photos.draw_boxes(towers)
    for half in ("frozen", "tuned"):
        towers.half = half
        others = (
            ("all_captions", "first_boxes", "own_boxes", "confirmed", "confirmed_twice", "averaged", "teacher_towers")
            if half == "frozen"
            else ()
        )
        for name in ("box_map", "first_all", *others):
            run = Run(towers, name, labelled=3, steps=4, seed=0)
            if run.setting.first and not run.first_folder.exists():  # both halves start from it
                photos.distil_first(run)
            if run.setting.teacher_boxes and half == "frozen":
                photos.learn_teacher_boxes(run)
            if run.setting.predictor:
                photos.predict_others(run)
                _check_predicted(run)
            photos.train_boxes(run)
            result = json.loads(run.result_file.read_text())
            assert result["setting"] == name and 0 <= result["acc@0.5"] <= 1
            assert result["right"].count("1") / len(result["right"]) == pytest.approx(result["acc@0.5"])
            assert set(result["gap_after"]["tokens"]) == {"gap", "alignment", "mismatch", "probe"}
            if not run.setting.first and not run.setting.teacher_towers:
                same = {key: round(value, 4) for key, value in result["gap_before"]["tokens"].items()}
                assert same == towers.__dict__.setdefault("before", same)  # all begin with the same student

    towers.half = "frozen"
    without_labels = Run(towers, "first_boxes", labelled=0, steps=4, seed=0)
    photos.train_boxes(without_labels)
    assert json.loads(without_labels.result_file.read_text())["log"] == []

    towers.labelled, towers.seeds = 3, [0]
    lines = confirmed_boxes.table(towers).splitlines()
    assert len(lines) == 2 + 4  # those settings that learn predicted boxes
    all_boxes, kept = (int(line.split("|")[2].replace(",", "")) for line in (lines[2], lines[3]))
    assert 0 < kept < all_boxes

    photos.measure_teacher(towers)
    monkeypatch.setattr("sys.argv", ["photo_report.py", str(towers.output_dir), str(tmp_path / "report")])
    photo_report.main()
    report = (tmp_path / "report" / "photos.md").read_text()
    assert "## Towers frozen" in report and "## Towers tuned" in report
    assert report.count("| all three terms first, boxes after |") == 12
    assert "The teacher draws a right box for " in report
    for plot in ("photos", "gap", "curve"):
        assert (tmp_path / "report" / f"{plot}.png").stat().st_size > 5_000


def test_rows_are_told_apart_by_whether_the_teacher_is_right():
    teacher = photo_report.digits("1100")
    runs = [{"right": "1000"}, {"right": "1101"}, {"seed": 2}]
    row = photo_report.teacher_section(teacher, {"tuned": {("box_map", 9): runs}}).splitlines()[-1]
    assert row == "| no teacher (map from the box: the control) | tuned | 9 | 75.0% | 25.0% | 25.0% | 2 |"


def test_differences_are_between_runs_of_the_same_seed():
    def run(seed: int, accuracy: float) -> dict:
        return {"seed": seed, "acc@0.5": accuracy}

    results = {("box_map", 9): [run(0, 0.1), run(1, 0.3)], ("all", 9): [run(0, 0.2), run(1, 0.42), run(2, 0.9)]}
    table = photo_report.difference_table({"box_map": "control", "all": "all"}, [9], results)
    assert table.splitlines()[2:] == ["| control | - |", "| all | +11.0 ± 1.4 |"]
