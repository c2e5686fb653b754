"""Patch embeddings of vision towers, as a teacher returns them, compared with references written out here."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.fixtures.teachers import EXPRESSIONS, GRIDS, VIT, load, model_config, normalised, save_folder, unit


def test_attention_pool(clip_folders):
    """The pooled embedding is the mean of the patches and of the mean feature, weighted by the pool's attention."""
    teacher = load(clip_folders["resnet of one head"])
    pixels = torch.rand(2, 3, 64, 64)
    image_embeds, patch_embeds = teacher.encode_images(pixels)
    with torch.no_grad():
        visual, pool = teacher.clip.visual, teacher.clip.visual.attnpool
        features = visual.forward_intermediates(normalised(pixels), indices=1)["image_intermediates"][0]
        tokens = features.reshape(2, 256, 4).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
        weights = (pool.q_proj(tokens[:, :1]) @ pool.k_proj(tokens).transpose(1, 2) / 16).softmax(-1)
        projected = pool.c_proj(pool.v_proj(tokens))
    assert weights.std() > 1e-3
    torch.testing.assert_close(patch_embeds.flatten(1, 2), unit(projected[:, 1:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(image_embeds, unit((weights @ projected)[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["vit", "vit with layer scale"])
def test_value_path(clip_folders, vision):
    """The reference is written out in matrices, from the file of weights."""
    teacher = load(clip_folders[vision])
    pixels = torch.rand(2, 3, 32, 32)
    _, patch_embeds = teacher.encode_images(pixels)
    w = {
        k.removeprefix("visual."): v
        for k, v in load_file(clip_folders[vision] / "open_clip_model.safetensors").items()
    }

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def scaled(x, name):
        return x * w[f"{name}.gamma"] if f"{name}.gamma" in w else x

    patches = normalised(pixels).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 192)
    x = torch.cat([w["class_embedding"].expand(2, 1, 16), patches @ w["conv1.weight"].reshape(16, 192).T], 1)
    x = norm(x + w["positional_embedding"], "ln_pre")
    for block in ("transformer.resblocks.0", "transformer.resblocks.1"):
        q, k, v = (norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T).split(16, -1)
        q_bias, k_bias, v_bias = w[f"{block}.attn.in_proj_bias"].split(16)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            scores = (q + q_bias)[..., head] @ (k + k_bias)[..., head].transpose(1, 2) / 8**0.5
            heads.append(scores.softmax(-1) @ (v + v_bias)[..., head])
        attended = torch.cat(heads, -1) @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"]
        x = x + scaled(attended, f"{block}.ls_1")
        hidden = norm(x, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
        hidden = nn.functional.gelu(hidden) @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
        x = x + scaled(hidden, f"{block}.ls_2")
    block = "transformer.resblocks.2"
    values = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"][32:].T + w[f"{block}.attn.in_proj_bias"][32:]
    out = scaled(values @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"], f"{block}.ls_1")
    expected = unit(norm(out, "ln_post") @ w["proj"])[:, 1:]
    torch.testing.assert_close(patch_embeds, expected.reshape(2, 4, 4, 24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["average", "average, then norm"])
def test_average_pool(clip_folders, vision):
    teacher = load(clip_folders[vision])
    pixels = torch.rand(2, 3, 32, 32)
    image_embeds, patch_embeds = teacher.encode_images(pixels)
    visual = teacher.clip.visual
    with torch.no_grad():
        tokens = visual.transformer(visual._embeds(normalised(pixels)))[:, 1:]
        patches = visual.ln_post(tokens) @ visual.proj
        pooled = visual.ln_post(tokens.mean(1)) @ visual.proj if vision.endswith("norm") else patches.mean(1)
    torch.testing.assert_close(patch_embeds, unit(patches).reshape(2, 4, 4, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(image_embeds, unit(pooled), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["timm", "timm with mlp"])
def test_average_pool_of_timm(clip_folders, vision):
    """The projection of each cell, and of their mean."""
    teacher = load(clip_folders[vision])
    pixels = torch.rand(2, 3, 64, 64)
    image_embeds, patch_embeds = teacher.encode_images(pixels)
    visual = teacher.clip.visual
    with torch.no_grad():
        features = visual.trunk.forward_features(normalised(pixels))
        cells = [[visual.head(features[:, :, row, column]) for column in range(2)] for row in range(2)]
    patches = torch.stack([torch.stack(row, dim=1) for row in cells], dim=1)
    torch.testing.assert_close(patch_embeds, unit(patches), rtol=0, atol=1e-5)
    expected = visual.head(features.mean((2, 3))) if vision == "timm with mlp" else patches.mean((1, 2))
    torch.testing.assert_close(image_embeds, unit(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(image_embeds, unit(visual(normalised(pixels))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["resnet", "vit", "average"])
def test_patches_lie_where_they_are_in_the_image(clip_folders, vision):
    """A change in one cell changes that cell's embedding most."""
    teacher = load(clip_folders[vision])
    rows, columns = GRIDS[vision]
    pixels = 0.5 + 0.02 * torch.rand(1, 3, 64, 64)
    _, before = teacher.encode_images(pixels)
    for row, column in [(0, columns - 1), (rows - 1, 0)]:
        changed = pixels.clone()
        height, width = 64 // rows, 64 // columns
        cell = changed[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
        cell[:, :, 2:-2, 2:-2] = torch.rand(1, 3, height - 4, width - 4)
        _, after = teacher.encode_images(changed)
        change = (after - before).norm(dim=-1)[0]
        assert divmod(int(change.argmax()), columns) == (row, column)


@pytest.mark.parametrize("vision", ["timm with max", "attentional pool", "custom attention"])
def test_towers_without_patches(clip_folders, vision):
    pixel_values = torch.rand(2, 3, 64, 64)
    teacher = load(clip_folders[vision])
    assert teacher(pixel_values, EXPRESSIONS, output_patches=False).image_embeds.shape == (2, 24)
    assert not teacher.has_patches
    tower = "TimmModel" if vision.startswith("timm") else "VisionTransformer"
    with pytest.raises(ValueError, match=f"for the vision tower {tower} and its pooling: use output_patches"):
        teacher(pixel_values, EXPRESSIONS)


def test_a_tower_of_one_block_has_no_patches(tmp_path):
    teacher = load(save_folder(tmp_path / "model", model_config(vision_cfg={**VIT, "layers": 1})))
    assert not teacher.has_patches


@pytest.mark.parametrize("vision", ["resnet", "vit", "average", "timm"])
def test_towers_with_patches(clip_folders, vision):
    assert load(clip_folders[vision]).has_patches
