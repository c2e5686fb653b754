"""Randomly initialised models of open_clip, saved as it publishes them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from epmvg_hf import ClipTeacher

open_clip = pytest.importorskip("open_clip")

EXPRESSIONS = ["the red circle", "a small dog on the left", "the red circle", "man"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
VIT = {"image_size": 32, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8}
VISION = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "resnet of one head": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 256},
    "vit": VIT,
    "vit with layer scale": {**VIT, "ls_init_value": 0.1},
    "average": {**VIT, "pool_type": "avg"},
    "average, then norm": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "attentional pool": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "custom attention": {**VIT, "qk_norm": True},
    "timm": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}
GRIDS = {name: (2, 2) if name.startswith("resnet") else (4, 4) for name in VISION}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def model_config(vision: str = "vit", **changes) -> dict:
    return {"embed_dim": 24, "vision_cfg": VISION[vision], "text_cfg": TEXT, **changes}


def save_folder(folder: Path, config: dict, seed: int = 0, **preprocess) -> Path:
    """A model with random weights as open_clip publishes them, in a new folder."""
    folder.mkdir(parents=True)
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim < 2 and tensor.is_floating_point():
                # Norms and biases are not to be trivial.
                tensor.add_(0.3 * torch.randn_like(tensor))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_bert_folder(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model whose Hugging Face tokenizer lies beside it; the name in its configuration is not looked at."""
    text = {**TEXT, "vocab_size": 40, "hf_tokenizer_name": "no/such-name", "pool_type": "eos", "eos_id": 3}
    save_folder(folder, model_config(text_cfg=text))
    tokenizer.save_pretrained(folder)
    return folder


def save_to_hub_cache(folder: Path, cache_dir: Path, repository: str) -> None:
    """The folder's files as a download of the repository would leave them in the Hub's cache."""
    cached = cache_dir / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)


def load(folder: Path) -> ClipTeacher:
    return ClipTeacher.from_pretrained(f"local-dir:{folder}")


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(tensor, dim=-1)


def normalised(pixels: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def assert_like_open_clip(teacher: ClipTeacher, folder: Path, pixels: torch.Tensor, mean=MEAN, std=STD):
    """Same embeddings as open_clip's own loading, tokenizer and towers give at the teacher's resolution."""
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(EXPRESSIONS)
    output = teacher(pixels, EXPRESSIONS, output_patches=False)
    expected = model.encode_image(normalised(pixels, mean, std), normalize=True)
    torch.testing.assert_close(output.image_embeds, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(output.text_embeds, model.encode_text(tokens, normalize=True), rtol=0, atol=2e-6)
    assert (output.text_embeds[0] - output.text_embeds[1]).abs().max() > 1e-3
