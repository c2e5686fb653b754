import json
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")

import timm
import train_teacher
from open_clip.model import CLIP
from safetensors.torch import load_file
from timm.models import save_for_hf
from train_teacher import CaptionCollator, CaptionedImages, ContrastiveModel
from transformers import TrainingArguments

from epmvg_hf import ClipTeacher, load_grounding_dataset
from epmvg_hf.runs.trained_tokenizer import train_tokenizer
from tests.fixtures.towers import save_text_tower

MODEL_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 200,
        "hf_tokenizer_name": "here",
        "width": 16,
        "heads": 2,
        "layers": 1,
        "pool_type": "eos",
    },
}


SETTINGS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}


@pytest.fixture
def scenes():
    return load_grounding_dataset("shapes", split="validation", num_images=6)


@pytest.fixture
def images(scenes) -> CaptionedImages:
    return CaptionedImages(scenes, canvas_size=32)


@pytest.fixture
def parts(images):
    tokenizer = train_tokenizer(images.all_captions(), 200)
    text = MODEL_CONFIG["text_cfg"] | {"vocab_size": len(tokenizer), "eos_id": tokenizer.sep_token_id}
    config = MODEL_CONFIG | {"text_cfg": text}
    torch.manual_seed(0)
    return CLIP(**config), config, tokenizer


def test_captions_are_true_and_boxes_are_not_read(scenes, images):
    without = CaptionedImages(scenes.remove_columns("box"), canvas_size=32)
    assert len(images) == 6 and torch.equal(images.canvases, without.canvases)
    assert [text for texts in images.expressions for text in texts] == list(scenes["expression"])
    seen = [
        scenes[next(row for row, i in enumerate(scenes["image_id"]) if i == name)]
        for name in dict.fromkeys(scenes["image_id"])
    ]
    for scene, sentences in zip(seen, images.sentences, strict=True):
        things = {f"a {item['size']} {item['color']} {item['shape']}" for item in scene["objects"]}
        assert all(set(sentence.split(" and ")) <= things for sentence in sentences)


def test_a_few_steps_learn(images, parts):
    clip, _, tokenizer = parts
    model, collator = ContrastiveModel(clip), CaptionCollator(tokenizer, 16, 64, SETTINGS)
    random.seed(0)
    batch = collator([images[index] for index in range(6)])
    assert batch["pixel_values"].shape == (6, 3, 64, 64) and batch["input_ids"].shape == (3, 6, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_contrastive_loss_is_that_of_open_clip():
    import open_clip

    images, texts = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    expected = open_clip.ClipLoss()(images, texts, torch.tensor(14.0))
    none = torch.zeros(5, 5, dtype=torch.bool)
    assert train_teacher.contrastive_loss(14.0 * images @ texts.T, none) == pytest.approx(expected.item(), rel=1e-6)


def test_a_text_that_two_images_share_tells_neither_from_the_other():
    same = train_teacher.same_texts(torch.tensor([[1, 2], [1, 3], [1, 2]]))
    assert same.nonzero().tolist() == [[0, 2], [2, 0]]
    logits = torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0], [5.0, 0.5, 2.0]])
    by_image = [[1.0, 2.0], [1.0, 3.0, 4.0], [2.0, 0.5]]  # the match first, then the others that are left
    by_text = [[1.0, 3.0], [1.0, 2.0, 0.5], [2.0, 4.0]]
    loss = [-row[0] + torch.tensor(row).logsumexp(0).item() for row in (*by_image, *by_text)]
    assert train_teacher.contrastive_loss(logits, same) == pytest.approx(sum(loss) / 6)


def test_saved_teacher_loads_and_is_evaluated(tmp_path, scenes, images, parts):
    clip, config, tokenizer = parts
    train_teacher.save_teacher(clip, config, SETTINGS, tokenizer, tmp_path / "teacher")
    files = {file.name for file in (tmp_path / "teacher").iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= files
    teacher = ClipTeacher.from_pretrained(f"local-dir:{tmp_path / 'teacher'}")
    pixels = train_teacher.preprocess(images.canvases, 64, SETTINGS)
    expected = clip.eval().encode_image(pixels, normalize=True)
    torch.testing.assert_close(teacher.encode_images(images.canvases / 255)[0], expected.detach(), atol=5e-3, rtol=0)

    metrics = train_teacher.evaluate_teacher(teacher, images, scenes)
    json.dumps(metrics)
    # Recall by a plain loop.
    text = teacher.encode_texts([sentences[0] for sentences in images.sentences])
    image = teacher.encode_images(images.canvases / 255)[0]
    first = [max(range(6), key=lambda other: float(image[row] @ text[other])) == row for row in range(6)]
    assert metrics["sentence_image_to_text_recall@1"] == pytest.approx(sum(first) / 6)
    assert metrics["chance_recall@1"] == pytest.approx(1 / 6) and 0 <= metrics["pointing"] <= 1


def test_a_teacher_of_pretrained_towers(tmp_path, scenes, monkeypatch):
    """Towers start as they are in their folders, learn at their own rate or not at all, and are loaded from one."""
    vision, text = tmp_path / "vision", save_text_tower("bert", tmp_path / "bert")
    save_for_hf(timm.create_model("test_efficientnet", num_classes=3), vision, safe_serialization=True)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_efficientnet", "timm_proj": "linear"},
        "text_cfg": {
            "context_length": 12, "hf_model_name": "an/encoder", "hf_tokenizer_name": "an/encoder",
            "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear",
        },
    }  # fmt: skip
    (tmp_path / "towers.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": SETTINGS}))

    def train(rate: str) -> ClipTeacher:
        monkeypatch.setattr(sys, "argv", [
            "train_teacher.py", "--config_name", str(tmp_path / "towers.json"), "--vision_name_or_path", str(vision),
            "--text_name_or_path", text, "--tower_learning_rate", rate, "--phrases_per_image", "2",
            "--used_image_size", "96",
            "--num_train_images", "8", "--per_device_train_batch_size", "4", "--max_steps", "2", "--canvas_size", "64",
            "--output_dir", str(tmp_path / rate), "--save_strategy", "no", "--use_cpu", "true", "--bf16", "false",
        ])  # fmt: skip
        monkeypatch.setattr(train_teacher, "use_hardware", lambda arguments: None)
        train_teacher.main()
        assert json.loads((tmp_path / rate / "teacher" / "metrics.json").read_text())["train_images"] == 8
        return ClipTeacher.from_pretrained(f"local-dir:{tmp_path / rate / 'teacher'}")

    stem = "conv_stem.weight"
    original = load_file(vision / "model.safetensors")[stem].half().float()
    words = load_file(Path(text) / "model.safetensors")["bert.embeddings.word_embeddings.weight"].half().float()
    for rate, same in (("0", True), ("1e-2", False)):
        teacher = train(rate)
        assert teacher.encode_images(torch.zeros(1, 3, 64, 64))[1].shape == (1, 3, 3, 16)  # 96 / 32 patches each way
        clip = teacher.clip
        assert torch.equal(clip.visual.trunk.get_parameter(stem), original) == same
        assert torch.equal(clip.text.transformer.embeddings.word_embeddings.weight, words) == same

    # Texts of all lengths have the embeddings that they have when all are padded.
    model = ContrastiveModel(clip)
    input_ids = torch.randint(5, 19, (9, 12)).masked_fill(torch.arange(12) > torch.randint(2, 12, (9, 1)), 0)
    torch.testing.assert_close(model.encode_texts(input_ids), clip.encode_text(input_ids, normalize=True))
    arguments = train_teacher.TeacherArguments(tower_learning_rate=1e-4, frozen_parameters=["embeddings", "conv_stem"])
    train_teacher.make_optimizer(model.requires_grad_(True), TrainingArguments(str(tmp_path)), arguments)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, _ in model.named_parameters() if "embeddings" in name or "conv_stem" in name} == frozen
    with pytest.raises(ValueError, match="must be given together"):
        train_teacher.make_clip(config, str(vision), None)
