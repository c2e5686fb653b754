import json
import random

import pytest
import torch

pytest.importorskip("open_clip")

import train_teacher
from open_clip.model import CLIP
from train_teacher import CaptionCollator, CaptionedImages, ContrastiveModel
from trained_tokenizer import train_tokenizer

from epmvg_hf import ClipTeacher, load_grounding_dataset

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
    model, collator = ContrastiveModel(clip), CaptionCollator(tokenizer, 16, 64)
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
    assert train_teacher.contrastive_loss(14.0 * images @ texts.T) == pytest.approx(expected.item(), rel=1e-6)


def test_saved_teacher_loads_and_is_evaluated(tmp_path, scenes, images, parts):
    clip, config, tokenizer = parts
    train_teacher.save_teacher(clip, config, tokenizer, tmp_path / "teacher")
    files = {file.name for file in (tmp_path / "teacher").iterdir()}
    assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"} <= files
    teacher = ClipTeacher.from_pretrained(f"local-dir:{tmp_path / 'teacher'}")
    pixels = train_teacher.preprocess(images.canvases, 64)
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
