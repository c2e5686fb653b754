"""What decides the outputs of a network that does not change: its weights, settings, image processor and tokenizer."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..model.image_processing_epmvg import EpmVGImageProcessor

# Settings of an image processor that have no influence on the pixels.
_IRRELEVANT_SETTINGS = ("image_processor_type", "processor_class")


def settings_of(image_processor: "EpmVGImageProcessor") -> dict[str, Any]:
    """Everything about an image processor that decides the pixels, as JSON types."""
    settings = json.loads(image_processor.to_json_string())
    for name in _IRRELEVANT_SETTINGS:
        settings.pop(name, None)
    # The two backends resize slightly differently, but their settings do not tell them apart.
    return {"class": type(image_processor).__name__, **settings}


def content_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The content of a tokenizer that decides which tokens a text becomes, as JSON types."""
    if not tokenizer.is_fast:
        return tokenizer.get_vocab()
    # These two settings are left over from the tokenizer's last call.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in content.items() if key not in ("truncation", "padding")}


def fingerprint_of(module: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of `settings`, which are JSON types, and of all weights and buffers of a module."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).cpu().view(torch.uint8).numpy())
    return digest.hexdigest()
