"""Converts a `CLIPModel` of transformers to the open_clip model that gives the same embeddings."""

import pickle
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..utils import in_short

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, CLIPConfig

# Parts of the tensor names in transformers (modeling_clip.py), and what open_clip calls them.
_RENAMED = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    ".layer_norm1.": ".ln_1.",
    ".self_attn.": ".attn.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}

# Buffers that count 0, 1, 2, ..., which older versions of transformers saved with the weights.
_UNUSED = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")

# open_clip creates every layer norm with PyTorch's default epsilon and has no setting for it.
_LAYER_NORM_EPS = 1e-5

# preprocessor_config.json has Pillow's number of a filter, open_clip its name.
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def load_transformers_clip(
    name: str, cache_dir: str | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """
    Reads a `CLIPModel` with all of its weights, in float32, or raises an error. Nothing in a file is executed. The
    tokenizer is left to the caller.

    Args:
        name (`str`): a folder or Hub repository that `CLIPModel.from_pretrained` can load.
        cache_dir (`str`, *optional*): where downloads are kept.

    Returns:
        `tuple`: open_clip's model configuration, preprocessing (`mean`, `std`, `interpolation`) and state dict.

    Raises:
        `OSError`: A file is missing or a download failed.
        `ValueError`: It is not a `CLIPModel`, open_clip has no equivalent of it, or the tensors are not exactly those
            of the model.

    Example:

    ```python
    >>> from epmvg_hf.distillation.convert_clip import load_transformers_clip

    >>> config, preprocess, tensors = load_transformers_clip("openai/clip-vit-base-patch32")
    >>> sorted(config), preprocess["interpolation"]
    (['embed_dim', 'quick_gelu', 'text_cfg', 'vision_cfg'], 'bicubic')
    ```
    """
    from transformers import AutoImageProcessor, CLIPConfig, CLIPModel

    with _reading("configuration", name):
        settings, _ = CLIPConfig.get_config_dict(name, cache_dir=cache_dir)
    # In both cases transformers would continue with default values, at best after a warning.
    if not settings:
        raise FileNotFoundError(f"there is no config.json in {name}.")
    if settings.get("model_type") != "clip":
        raise ValueError(f'transformers:{name} must have the model_type "clip", not {settings.get("model_type")!r}.')
    with _reading("configuration", name):
        config = CLIPConfig.from_dict(settings)
    model_config = _convert_config(config)

    with _reading("preprocessing", name):
        image_processor = AutoImageProcessor.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
    preprocess = _convert_preprocess(image_processor)

    # transformers draws missing tensors at random before it reports them. That must not use up the random numbers
    # that the student is initialised with.
    with _reading("weights", name), torch.random.fork_rng(devices=[]):
        model, report = CLIPModel.from_pretrained(
            name,
            config=config,
            cache_dir=cache_dir,
            # The configuration may name a dtype that is less precise than the file.
            dtype=torch.float32,
            weights_only=True,
            # The configuration may name another implementation, whose kernel would be downloaded and executed.
            attn_implementation="eager",
            # Wrong shapes then appear in the report, with everything else that is wrong.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    problems = {
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "of another shape": {key for key, *_ in report["mismatched_keys"]},
    }
    if any(problems.values()):
        details = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, keys in problems.items() if keys)
        details = textwrap.shorten(details, 400, placeholder=" ...")
        raise ValueError(f"transformers:{name} does not hold the tensors of its model ({details}).")
    return model_config, preprocess, _convert_state_dict(model.state_dict())


def _convert_config(config: "CLIPConfig") -> dict[str, Any]:
    """
    The configuration of the `open_clip.CLIP` (open_clip: model.py, transformer.py) that computes the same as the
    `CLIPModel` with this configuration.

    Raises:
        `ValueError`: open_clip has no equivalent model.
    """
    text, vision = config.text_config, config.vision_config
    if config.to_dict().get("quantization_config"):
        raise ValueError("quantized weights cannot be converted: save the model without quantization_config first.")
    for tower, settings in (("text", text), ("vision", vision)):
        if settings.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(
                f'hidden_act of the {tower} tower must be "quick_gelu" or "gelu", which open_clip has, not '
                f"{settings.hidden_act!r}."
            )
        if settings.layer_norm_eps != _LAYER_NORM_EPS:
            raise ValueError(
                f"layer_norm_eps of the {tower} tower must be {_LAYER_NORM_EPS}, as in open_clip, not "
                f"{settings.layer_norm_eps}."
            )
    if text.hidden_act != vision.hidden_act:
        raise ValueError(
            f"hidden_act must be the same for both towers, as in open_clip, not {text.hidden_act!r} for text and "
            f"{vision.hidden_act!r} for vision."
        )
    if not isinstance(text.eos_token_id, int):
        raise ValueError(f"eos_token_id of the text tower must be one token, not {text.eos_token_id}.")
    # CLIPTextModel ignored eos_token_id at first, and configurations of that time hold a wrong 2. For them it still
    # pools the token with the highest id.
    pooling = {"pool_type": "argmax"} if text.eos_token_id == 2 else {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": _mlp_ratio(vision.intermediate_size, vision.hidden_size),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "mlp_ratio": _mlp_ratio(text.intermediate_size, text.hidden_size),
            **pooling,
        },
    }


def _convert_preprocess(image_processor: "BaseImageProcessor") -> dict[str, Any]:
    """
    `mean`, `std` and `interpolation` of an image processor. Its sizes are ignored: a teacher resizes whole canvases to
    the resolution of its vision tower.

    Raises:
        `ValueError`: A teacher cannot prepare images in this way.
    """
    if not (image_processor.do_rescale and abs(255 * image_processor.rescale_factor - 1) < 1e-3):
        raise ValueError(
            "the image processor must scale pixels to [0, 1], by do_rescale and a rescale_factor of 1/255."
        )
    if not image_processor.do_normalize:
        raise ValueError("the image processor must normalise pixels, by do_normalize, image_mean and image_std.")
    if image_processor.resample not in _INTERPOLATIONS:
        raise ValueError(
            f"resample of the image processor must be 2 (bilinear) or 3 (bicubic), not {image_processor.resample}."
        )
    return {
        "mean": image_processor.image_mean,
        "std": image_processor.image_std,
        "interpolation": _INTERPOLATIONS[image_processor.resample],
    }


def _convert_state_dict(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The complete state dict of a `CLIPModel` as that of an `open_clip.CLIP`."""
    converted = {}
    for name, tensor in tensors.items():
        if name in _UNUSED:
            continue
        for part, renamed in _RENAMED.items():
            name = name.replace(part, renamed)
        converted[name] = tensor
    for name in [name for name in converted if ".attn.q_proj." in name]:
        # open_clip has one matrix, and one bias, for queries, keys and values.
        parts = [converted.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        converted[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    for name in ("visual.proj", "text_projection"):
        # A linear layer multiplies by the transpose of its weight, open_clip by these matrices themselves.
        converted[name] = converted[name].T
    return converted


def _mlp_ratio(intermediate_size: int, hidden_size: int) -> float:
    # open_clip computes int(width * ratio), which may come out one too small because the exact ratio is rounded. Half
    # a unit more avoids that. The exact ratio is kept where it works, since it is part of fingerprints.
    exact = intermediate_size / hidden_size
    return exact if int(hidden_size * exact) == intermediate_size else (intermediate_size + 0.5) / hidden_size


@contextmanager
def _reading(what: str, name: str) -> Iterator[None]:
    """Turns any error while a part of a model is read into one sentence that says what was being read."""
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's own message would tell how to run the code
        raise ValueError(
            f"the {what} of transformers:{name} hold more than tensors, such as code, and are not loaded."
        ) from error
    except Exception as error:  # files can be missing or malformed in many ways
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"the {what} of transformers:{name} could not be loaded: {in_short(error)}") from error
