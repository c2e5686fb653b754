"""Converts a checkpoint of the original TransVG (djiajunustc/TransVG) to a model that returns the same boxes."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from .configuration_epmvg import EpmVGConfig
from .modeling_epmvg import EpmVGForVisualGrounding
from .pretrained_towers import list_first
from .weight_files import check_unpacked_size

_RESNET = "visumodel.backbone.0.body"
_BERT = "textmodel.bert"
_ENCODER = "visumodel.transformer.encoder"
_FUSION = "vl_transformer.encoder"

# How names of this model's tensors become TransVG's. All patterns are applied to each name, in this order.
_ORIGINAL_NAMES = (
    (r"^model\.vision_model\.embedder\.embedder\.convolution\.", f"{_RESNET}.conv1."),
    (r"^model\.vision_model\.embedder\.embedder\.normalization\.", f"{_RESNET}.bn1."),
    # Stages, and the convolutions of a block, are numbered from 0 in transformers and from 1 in TransVG.
    (r"^model\.vision_model\.encoder\.stages\.(\d+)\.layers\.", lambda match: f"{_RESNET}.layer{int(match[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d+)\.convolution\.", lambda match: f".conv{int(match[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda match: f".bn{int(match[1]) + 1}."),
    (r"^model\.input_projection\.", "visumodel.input_proj."),
    (r"^model\.encoder\.", f"{_ENCODER}."),
    (r"^model\.fusion\.", f"{_FUSION}."),
    # TransVG has one matrix and one bias for queries, keys and values.
    (r"\.self_attn\.[qkv]_proj\.", ".self_attn.in_proj_"),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.fc(\d)\.", r".linear\1."),
    (r"^model\.text_model\.", f"{_BERT}."),
    (r"^model\.visual_projection\.", "visu_proj."),
    (r"^model\.text_projection\.", "text_proj."),
    (r"^model\.reg_token$", "reg_token.weight"),
    (r"^model\.fusion_positions$", "vl_pos_embed.weight"),
    (r"^box_head\.(\d+)\.", lambda match: f"bbox_embed.layers.{int(match[1]) // 2}."),
)

# Tensors of a checkpoint that no box depends on and that this model does not have, each with the reason.
_UNUSED = {
    rf"{_RESNET}\.(.+\.)?(bn\d|downsample\.1)\.num_batches_tracked": "frozen batch norms do not read this counter",
    rf"{_BERT}\.embeddings\.position_ids": "it is the constant 0, 1, 2, ..., which some versions of BERT save",
    rf"{_BERT}\.pooler\.dense\.(weight|bias)": "TransVG reads the states of BERT's tokens, not the pooled state",
}

# What TransVG's train.py saves along with the weights.
_TRAINING_STATE = ("args", "epoch", "lr_scheduler", "optimizer", "val_accu")

# TransVG's defaults for settings that neither the tensors nor the saved arguments tell.
_ATTENTION_HEADS = 8
_IMAGE_SIZE = 640
# TransVG uses 40 tokens for RefCOCOg and 20 for the other benchmarks.
_PUBLISHED_TEXT_LENGTHS = (20, 40)
# More tokens than this are taken as a sign that the canvas is not of the default size.
_LARGEST_TEXT_LENGTH = 128
_STRIDE = 32
# BERT checkpoints all use 64 channels per attention head, which a state dict does not tell.
_BERT_HEAD_DIM = 64


def read_transvg_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    """
    Reads a checkpoint. No file can make it run code: a checkpoint may hold tensors, plain Python values, and the one
    class `argparse.Namespace`, which only holds attributes. TransVG saves its arguments as one.

    Args:
        path (`str` or `Path`): a file that TransVG's `train.py` saved, or a file of its state dict alone.

    Returns:
        `tuple`: the tensors, whose names do not begin with `module.`; TransVG's arguments, empty if they were not
        saved; and for each other entry of the file the reason why it is not used.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, could run code, or holds something unknown.

    Example:

    ```python
    >>> from epmvg_hf.model.convert_transvg import read_transvg_checkpoint

    >>> tensors, args, reasons = read_transvg_checkpoint("TransVG_R50_unc.pth")
    >>> "vl_pos_embed.weight" in tensors
    True
    ```
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is not a checkpoint of TransVG: those are .pth files.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    check_unpacked_size(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message explains how to run the code nevertheless
        raise ValueError(f"{path} is damaged or holds more than tensors, such as code, and is not loaded.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of tensors.")

    tensors, others = checkpoint, {}
    if "model" in checkpoint:
        tensors = checkpoint["model"]
        others = {name: value for name, value in checkpoint.items() if name != "model"}
    unknown = [str(name) for name in others if name not in _TRAINING_STATE]
    if unknown:
        raise ValueError(f"{path} holds entries that TransVG does not save: {list_first(unknown)}.")
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f'"model" in {path} is not a dictionary of tensors.')
    no_tensors = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if no_tensors:
        raise ValueError(f"{path} holds entries that are not tensors: {list_first(no_tensors)}.")

    # The names begin with "module." if DistributedDataParallel wrapped the model when it was saved.
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    saved_args = others.get("args")
    args = vars(saved_args) if isinstance(saved_args, argparse.Namespace) else {}
    reasons = dict.fromkeys(others, "it is the state of training, not weights")
    if args:
        reasons["args"] = "it is only read for what the tensors do not tell, such as the numbers of attention heads"
    return tensors, args, reasons


def convert_transvg(
    tensors: dict[str, torch.Tensor], args: dict[str, Any] | None = None, image_size: int | None = None
) -> tuple[EpmVGForVisualGrounding, dict[str, str]]:
    """
    Makes the model that returns the boxes of a TransVG with these tensors.

    Args:
        tensors (`dict[str, torch.Tensor]`): TransVG's state dict. All sizes are read from it.
        args (`dict`, *optional*): TransVG's arguments, for what the tensors do not tell: the numbers of attention
            heads, the image size, and how many of BERT's layers are used. By default these are TransVG's defaults and
            all layers.
        image_size (`int`, *optional*): side of the canvas in pixels, if it is not 640 and not among `args`.

    Returns:
        `tuple`: the model, in float32 and evaluation mode, and for each unused tensor the reason why it is not used.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong shape or not of floating point; TransVG's arguments ask
            for something that this model does not do; or the image size cannot be inferred.

    Example:

    ```python
    >>> from epmvg_hf.model.convert_transvg import convert_transvg, read_transvg_checkpoint

    >>> tensors, args, _ = read_transvg_checkpoint("TransVG_R50_unc.pth")
    >>> model, unused = convert_transvg(tensors, args)
    >>> model.config.box_head, model.config.max_text_length
    ('reg', 20)
    >>> model.save_pretrained("outputs/converted")
    ```
    """
    try:
        config = _read_config(tensors, args or {}, image_size)
    except StrictDataclassError as error:
        raise ValueError(f"no TransVG has the sizes of these tensors: {error.__cause__}.") from error
    unused = _find_unused(tensors, config)
    # All weights are replaced by those of the file, so drawing new ones would be a waste of time.
    with no_init_weights():
        model = EpmVGForVisualGrounding(config).eval()
    weights = model.state_dict()
    originals = {name: _original_name(name) for name in weights if not name.endswith("num_batches_tracked")}
    _check_names(tensors, set(originals.values()), unused)

    for name, original in originals.items():
        value, expected = tensors[original], weights[name].shape
        part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
        whole = (3 * expected[0], *expected[1:]) if part else expected
        if name == "model.reg_token":
            whole = (1, *expected)
        if tuple(value.shape) != tuple(whole):
            raise ValueError(
                f"{original} has the shape {tuple(value.shape)}, not {tuple(whole)}, as other tensors imply."
            )
        if not value.is_floating_point():
            raise ValueError(f"{original} holds {value.dtype}, expected floating point numbers.")
        weights[name] = value.chunk(3)["qkv".index(part[1])] if part else value.reshape(expected)
    model.load_state_dict(weights, strict=True)
    return model, unused


def _read_config(tensors: dict[str, torch.Tensor], args: dict[str, Any], image_size: int | None) -> EpmVGConfig:
    """The configuration of the model that has the sizes of these tensors, see [`convert_transvg`]."""

    def size(name: str, axis: int, default: int) -> int:
        # A missing tensor is no error yet: `_check_names` will name it along with unknown ones, since it may have been
        # renamed. Until then TransVG's own size stands in.
        return tensors[name].shape[axis] if name in tensors and tensors[name].ndim > axis else default

    if args.get("dilation"):
        raise ValueError("this TransVG has a dilated ResNet (--dilation), which transformers does not have.")
    bert_layers = _setting(args, "bert_enc_num", max(1, _count(tensors, rf"{_BERT}\.encoder\.layer")))
    if bert_layers < 1:
        raise ValueError("this TransVG reads BERT's word embeddings alone (--bert_enc_num 0), which is not supported.")
    hidden_size = size(f"{_BERT}.embeddings.word_embeddings.weight", 1, 768)
    if hidden_size % _BERT_HEAD_DIM:
        raise ValueError(
            f"BERT is {hidden_size} wide, which is not a multiple of {_BERT_HEAD_DIM}, the width of a head."
        )
    image_size, max_text_length = _image_and_text(size("vl_pos_embed.weight", 0, 421), args, image_size)

    stages = range(1, 5)
    return EpmVGConfig(
        backbone_config={
            "model_type": "resnet",
            "layer_type": "bottleneck",
            "embedding_size": size(f"{_RESNET}.conv1.weight", 0, 64),
            "hidden_sizes": [size(f"{_RESNET}.layer{i}.0.conv3.weight", 0, 128 * 2**i) for i in stages],
            "depths": [max(1, _count(tensors, rf"{_RESNET}\.layer{i}")) for i in stages],
            "out_features": ["stage4"],
        },
        backbone_stride=_STRIDE,
        text_config={
            "model_type": "bert",
            "vocab_size": size(f"{_BERT}.embeddings.word_embeddings.weight", 0, 30522),
            "hidden_size": hidden_size,
            "num_hidden_layers": bert_layers,
            "num_attention_heads": hidden_size // _BERT_HEAD_DIM,
            "intermediate_size": size(f"{_BERT}.encoder.layer.0.intermediate.dense.weight", 0, 4 * hidden_size),
            "max_position_embeddings": size(f"{_BERT}.embeddings.position_embeddings.weight", 0, 512),
            "type_vocab_size": size(f"{_BERT}.embeddings.token_type_embeddings.weight", 0, 2),
        },
        d_model=size("visumodel.input_proj.weight", 0, 256),
        encoder_layers=_count(tensors, rf"{_ENCODER}\.layers"),
        encoder_attention_heads=_setting(args, "nheads", _ATTENTION_HEADS),
        encoder_ffn_dim=size(f"{_ENCODER}.layers.0.linear1.weight", 0, 2048),
        fusion_layers=_count(tensors, rf"{_FUSION}\.layers"),
        fusion_attention_heads=_setting(args, "vl_nheads", _ATTENTION_HEADS),
        fusion_ffn_dim=size(f"{_FUSION}.layers.0.linear1.weight", 0, 2048),
        image_size=image_size,
        max_text_length=max_text_length,
    )


def _image_and_text(rows: int, args: dict[str, Any], image_size: int | None) -> tuple[int, int]:
    """
    The image size and the text length. Together they give the number of rows of `vl_pos_embed`, which are one for
    `[REG]`, one for each token, and one for each cell of the square grid.
    """

    def tokens(size: int) -> int:
        return rows - 1 - (size // _STRIDE) ** 2

    image_size = image_size or _setting(args, "imsize", None)
    if image_size is None:
        image_size = _IMAGE_SIZE
        if not 3 <= tokens(image_size) <= _LARGEST_TEXT_LENGTH:
            sizes = range(_STRIDE, _STRIDE * int(rows**0.5) + 1, _STRIDE)
            fitting = [size for size in sizes if tokens(size) in _PUBLISHED_TEXT_LENGTHS]
            if len(fitting) != 1:
                raise ValueError(f"vl_pos_embed has {rows} rows, which do not tell the image size: give image_size.")
            image_size = fitting[0]
    if image_size < 1 or image_size % _STRIDE:
        raise ValueError(f"image_size is {image_size}, not a multiple of {_STRIDE}, the pixels of a cell.")
    length = tokens(image_size)
    # The shortest text is [CLS], one word and [SEP].
    if length < 3 or length != _setting(args, "max_query_len", length):
        raise ValueError(
            f"vl_pos_embed has {rows} rows, which leaves {length} tokens for text beside [REG] and the grid of "
            f"{image_size} pixels, not {_setting(args, 'max_query_len', '3 or more')}."
        )
    return image_size, length


def _setting(args: dict[str, Any], name: str, default: Any) -> Any:
    value = args.get(name, default)
    if name in args and not isinstance(value, int):
        raise ValueError(f"TransVG's argument {name} is {value!r}, expected a whole number.")
    return value


def _count(tensors: dict[str, torch.Tensor], stem: str) -> int:
    """
    The number of layers whose names begin with `stem`. If their numbers have a gap, the tensors of the last layers
    will be reported as missing or unexpected.
    """
    return len({match[1] for name in tensors if (match := re.match(rf"{stem}\.(\d+)\.", name))})


def _find_unused(tensors: dict[str, torch.Tensor], config: EpmVGConfig) -> dict[str, str]:
    """The tensors that no box depends on, each with the reason."""
    unused = {}
    bert: PreTrainedConfig = config.text_config
    layers = bert.num_hidden_layers
    for name in tensors:
        for pattern, reason in _UNUSED.items():
            if re.fullmatch(pattern, name):
                unused[name] = reason
        layer = re.match(rf"{_BERT}\.encoder\.layer\.(\d+)\.", name)
        if layer and int(layer[1]) >= layers:
            unused[name] = f"TransVG reads the states of layer {layers} of BERT (--bert_enc_num)"
    return unused


def _original_name(name: str) -> str:
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_names(tensors: dict[str, torch.Tensor], expected: set[str], unused: dict[str, str]) -> None:
    problems = {"missing": expected - tensors.keys(), "unexpected": tensors.keys() - expected - unused.keys()}
    if any(problems.values()):
        details = "; ".join(f"{kind}: {list_first(sorted(names))}" for kind, names in problems.items() if names)
        raise ValueError(f"these are not the tensors of a TransVG ({details}).")
