"""What a teacher computes, compared with open_clip; its checks of inputs; and its fingerprint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.functional import to_pil_image

from epmvg_hf.distillation.clip_teacher import ClipTeacher, TeacherOutput
from tests.fixtures.teachers import (
    EXPRESSIONS,
    GRIDS,
    STD,
    VISION,
    VIT,
    assert_like_open_clip,
    load,
    model_config,
    normalised,
    save_bert_folder,
    save_folder,
)

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def folder(clip_folders) -> Path:
    return clip_folders["vit"]


@pytest.fixture(scope="module")
def teacher(folder) -> ClipTeacher:
    return load(folder)


def test_a_missing_package(monkeypatch, folder):
    monkeypatch.delitem(sys.modules, "epmvg_hf.distillation.teacher_sources", raising=False)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'^ClipTeacher needs open_clip: pip install "epmvg_hf\[teacher\]"$'):
        load(folder)


def test_open_clip_is_imported_only_when_used():
    code = "import sys, epmvg_hf, epmvg_hf.distillation.clip_teacher; print('open_clip' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "False"


# Frozen


def test_a_teacher_stays_frozen(clip_folders, pixel_values):
    teacher = load(clip_folders["resnet"])
    before = teacher.fingerprint
    holder = nn.ModuleList([teacher])
    holder.train()
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    pixel_values.requires_grad_(True)
    output = teacher.requires_grad_(True)(pixel_values, EXPRESSIONS)
    assert not any(embeds.requires_grad for embeds in output.values())
    # In training mode, batch norm would have changed its statistics.
    del teacher.fingerprint
    assert teacher.fingerprint == before


# Outputs


@pytest.mark.parametrize("vision", VISION)
def test_every_tower_gives_what_open_clip_gives(clip_folders, vision):
    teacher = load(clip_folders[vision])
    pixels = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    assert_like_open_clip(teacher, clip_folders[vision], pixels)
    assert teacher.embed_dim == 24


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_shapes_and_lengths(clip_folders, vision):
    teacher = load(clip_folders[vision])
    pixels = torch.rand(2, 3, 48, 48)
    output = teacher(pixels, EXPRESSIONS)
    assert isinstance(output, TeacherOutput)
    assert output.image_embeds.shape == (2, 24)
    assert output.text_embeds.shape == (4, 24)
    assert output.patch_embeds.shape == (2, *GRIDS[vision], 24)
    for embeds in output.values():
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]))
    image_embeds, nothing = teacher.encode_images(pixels, output_patches=False)
    torch.testing.assert_close(image_embeds, output.image_embeds, rtol=0, atol=1e-6)
    assert nothing is None
    assert teacher(pixels, EXPRESSIONS, output_patches=False).patch_embeds is None


def test_its_own_mean_std_and_resolution(tmp_path, folder, pixel_values):
    settings = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "size": 999}  # the size is that of the tower
    other = save_folder(tmp_path / "other", model_config(), **settings)
    assert_like_open_clip(load(other), other, pixel_values, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    larger = save_folder(tmp_path / "larger", model_config(vision_cfg={**VIT, "image_size": 48}))
    teacher = load(larger)
    assert teacher.image_size == 48
    assert teacher.encode_images(pixel_values)[1].shape == (2, 6, 6, 24)
    assert_like_open_clip(teacher, larger, torch.rand(2, 3, 48, 48))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_canvas_of_another_size(tmp_path, interpolation):
    """It is resized as a whole, which is also what open_clip does to a square image."""
    folder = save_folder(tmp_path / "model", model_config(), interpolation=interpolation)
    teacher = load(folder)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for side in (20, 50, 64):
        # Away from 0 and 255, because Pillow also clamps between resizing rows and columns. It rounds there, too.
        pixels = torch.randint(80, 176, (1, 3, side, side), dtype=torch.uint8)
        expected = transform(to_pil_image(pixels[0]))
        assert (teacher._preprocess(pixels / 255)[0] - expected).abs().max() < 2 / 255 / min(STD)


def test_what_overshoots_is_clamped(teacher):
    """Bicubic resizing of an edge between black and white overshoots [0, 1]."""
    pixels = torch.zeros(1, 3, 20, 20)
    pixels[..., 10:] = 1
    seen = teacher._preprocess(pixels)
    assert seen.min() == normalised(torch.zeros(3, 1, 1)).min()
    assert seen.max() == normalised(torch.ones(3, 1, 1)).max()


def test_pixels_that_are_no_canvas(teacher, pixel_values):
    with pytest.raises(ValueError, match=r"pixel_values must have the shape \(B, 3, S, S\), not \(2, 3, 32, 16\)"):
        teacher.encode_images(pixel_values[..., :16])
    for wrong in (normalised(pixel_values), pixel_values * 255, pixel_values * torch.nan):
        with pytest.raises(ValueError, match=r"pixel_values must be in \[0, 1\], not yet normalised"):
            teacher.encode_images(wrong)


def test_equal_expressions_are_computed_once(teacher, monkeypatch):
    seen = []
    tokenize = teacher.tokenizer
    monkeypatch.setattr(teacher, "tokenizer", lambda texts: seen.append(texts) or tokenize(texts))
    embeds = teacher.encode_texts(EXPRESSIONS)
    assert seen == [[EXPRESSIONS[0], EXPRESSIONS[1], EXPRESSIONS[3]]]
    assert torch.equal(embeds[0], embeds[2])
    for row, expression in enumerate(EXPRESSIONS):
        torch.testing.assert_close(embeds[row], teacher.encode_texts([expression])[0], rtol=0, atol=1e-6)


def test_no_expressions_and_no_list(teacher):
    assert teacher.encode_texts([]).shape == (0, 24)
    with pytest.raises(ValueError, match="expressions must be a list of strings, not the string 'man'"):
        teacher.encode_texts("man")


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_bfloat16(clip_folders, vision):
    """Under autocast, and with converted weights."""
    teacher = load(clip_folders[vision])
    pixels = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    expected = teacher(pixels, EXPRESSIONS)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = teacher(pixels, EXPRESSIONS)
    for output in (autocast, teacher.bfloat16()(pixels, EXPRESSIONS)):
        for key, embeds in output.items():
            assert embeds.dtype == torch.float32
            assert not torch.equal(embeds, expected[key])
            assert (embeds * expected[key]).sum(-1).min() > 0.99
            torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]))


# Fingerprint


def test_fingerprint(folder, teacher, tmp_path, tokenizer):
    weights = str(folder / "open_clip_model.safetensors")
    known = {"first": teacher.fingerprint}
    assert len(known["first"]) == 64
    used = load(folder)
    used.encode_texts(EXPRESSIONS)
    assert used.fingerprint == known["first"]
    config = str(folder / "open_clip_config.json")

    def changed(name: str, **changes) -> str:
        content = json.loads(Path(config).read_text())
        content = {key: {**value, **changes.get(key, {})} for key, value in content.items()}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return ClipTeacher.from_pretrained(str(path), weights).fingerprint

    assert changed("same") == known["first"]
    known["mean"] = changed("mean", preprocess_cfg={"mean": [0.5, 0.4, 0.31]})
    known["std"] = changed("std", preprocess_cfg={"std": [0.2, 0.25, 0.31]})
    known["interpolation"] = changed("interpolation", preprocess_cfg={"interpolation": "bilinear"})
    known["size"] = changed("size", model_cfg={"vision_cfg": {**VIT, "image_size": 40}})
    known["heads"] = changed("heads", model_cfg={"vision_cfg": {**VIT, "head_width": 4}})
    known["activation"] = changed("activation", model_cfg={"quick_gelu": True})

    tensors = load_file(weights)
    tensors["visual.proj"][3, 4] += 1e-3
    shutil.copytree(folder, tmp_path / "weight")
    save_file(tensors, tmp_path / "weight" / "open_clip_model.safetensors")
    known["weight"] = load(tmp_path / "weight").fingerprint

    bert_folder = save_bert_folder(tmp_path / "bert", tokenizer)
    teacher = load(bert_folder)
    known["bert"] = teacher.fingerprint
    del teacher.fingerprint
    teacher.encode_texts(EXPRESSIONS)
    assert teacher.fingerprint == known["bert"]
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words[5], words[6] = words[6], words[5]
    type(tokenizer)(vocab={word: index for index, word in enumerate(words)}).save_pretrained(bert_folder)
    known["tokenizer"] = load(bert_folder).fingerprint
    assert len(set(known.values())) == len(known)
