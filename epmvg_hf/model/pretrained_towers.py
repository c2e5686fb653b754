"""Pretrained vision and text towers, their image statistics and their tokenizer, for a new grounding model."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPVisionConfig,
    DetrConfig,
    DetrModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TimmBackboneConfig,
    ViTConfig,
)
from transformers.utils import logging

from .configuration_epmvg import EpmVGConfig
from .patch_backbone import PatchBackboneConfig, without_pooling

logger = logging.get_logger(__name__)

# Norms in front of a backbone's feature maps. Most checkpoints were trained without them, and they start as identity.
_FRESH_NORMS = "hidden_states_norms."

# DETR's sizes that the encoder has to share, all of the same name here.
_DETR_SETTINGS = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "activation_function")

_STATISTICS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


@dataclass
class Tower:
    """
    What a pretrained tower brings along.

    Args:
        name (`str`): where it comes from.
        config (`PreTrainedConfig`): the `backbone_config` or `text_config` of the grounding model.
        weights (`dict[str, torch.Tensor]`): its tensors by their names in `EpmVGModel`.
        fresh (`list[str]`): tensors of it that the checkpoint lacks.
        unused (`list[str]`): names of the checkpoint's tensors that a grounding model has no place for.
        settings (`dict`): settings of [`EpmVGConfig`] that its tensors need.
    """

    name: str
    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def model_from_towers(
    model_class: type[PreTrainedModel], vision: str, text: str, out_features: list[str] | None = None, **config: Any
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """
    The model of [`~EpmVGModel.from_vision_text_pretrained`], and the rows of its table.

    Returns:
        `tuple`: the model in evaluation mode, and for each part of it `part`, `source` (`None` if it is fresh),
        `parameters` (how many), `fresh` and `unused` (see [`Tower`]).
    """
    vision_tower, text_tower = load_vision_tower(vision, out_features), load_text_tower(text)
    for name, value in vision_tower.settings.items():
        if config.setdefault(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, but {vision} was trained with {value!r}")
    if isinstance(vision_tower.config, PatchBackboneConfig):
        patches: PreTrainedConfig = vision_tower.config.tower_config
        config.setdefault("image_size", patches.image_size)
    model_config = EpmVGConfig(backbone_config=vision_tower.config, text_config=text_tower.config, **config)
    model_config.backbone_stride = _stride(vision_tower, model_config.image_size)

    model = model_class(model_config).eval()
    base, weights = model.base_model, vision_tower.weights | text_tower.weights
    missing, unexpected = base.load_state_dict(weights, strict=False)
    parts = {name.split(".")[0] for name in weights}
    # Frozen batch norms, as DETR's, do not count batches.
    missing = [name for name in missing if name.split(".")[0] in parts and not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"{vision} and {text} are not the towers that their configs describe: missing {in_short(missing)}; "
            f"unexpected {in_short(unexpected)}"
        )
    _check_text_length(base.text_model, text, model_config.max_text_length)
    rows = _rows(model, vision_tower, text_tower)
    logger.warning("towers loaded, everything else to be trained:\n%s", loading_table(rows))
    return model, rows


def load_vision_tower(name: str, out_features: list[str] | None = None) -> Tower:
    """
    Args:
        name (`str`): folder or Hub id of a DETR, a CLIP, a ViT, a timm model or anything that `AutoBackbone` takes.
        out_features (`list[str]`, *optional*): the backbone's feature maps to use; by default the last one.

    Raises:
        `ValueError`: it is none of these, or tensors are missing or of another shape.
    """
    config = _tower_config(name)
    if isinstance(config, CLIPConfig):
        config = config.vision_config
    if isinstance(config, DetrConfig):
        return _load_detr(name, config, out_features)
    if config.model_type == "timm_wrapper":
        return _load_timm(name, config, out_features)
    if isinstance(config, CLIPVisionConfig | ViTConfig):
        model, fresh, unused = _read(MODEL_MAPPING[type(config)], name, config, **without_pooling(config))
        tensors = {f"tower.{key}": value for key, value in model.state_dict().items()}
        # Only the pooled class token passes through it.
        pooled = [key for key in tensors if key.startswith("tower.post_layernorm.")]
        unused += [key.removeprefix("tower.") for key in pooled]
        tensors = {key: value for key, value in tensors.items() if key not in pooled}
        config = PatchBackboneConfig(tower_config=model.config, out_features=out_features)
    elif type(config) in MODEL_FOR_BACKBONE_MAPPING and not isinstance(config, TimmBackboneConfig):
        config.out_features = out_features or [config.stage_names[-1]]
        if config.to_dict().get("use_mask_token"):
            config.use_mask_token = False  # only masked images use it, so it would never get a gradient
        model, fresh, unused = _read(MODEL_FOR_BACKBONE_MAPPING[type(config)], name, config)
        tensors, config = model.state_dict(), model.config
    else:
        raise ValueError(
            f"{name} is a {config.model_type!r}, not a vision tower: expected a DETR, CLIP, ViT, timm model or a "
            "backbone of AutoBackbone"
        )
    weights = {f"vision_model.{key}": value for key, value in tensors.items()}
    return Tower(name, config, weights, fresh, unused)


def load_text_tower(name: str) -> Tower:
    """
    Args:
        name (`str`): folder or Hub id of a BERT, RoBERTa, DistilBERT, CLIP or another text encoder of `AutoModel`.

    Raises:
        `ValueError`: it is none of these, or tensors are missing or of another shape.
    """
    config = _tower_config(name)
    if isinstance(config, CLIPConfig):
        config = config.text_config
    model_class = MODEL_MAPPING.get(type(config), None)
    if model_class is None or "text" not in model_class.input_modalities or config.is_encoder_decoder:
        raise ValueError(
            f"{name} is a {config.model_type!r}, not a text tower: expected a BERT, RoBERTa, DistilBERT, CLIP or "
            "another text encoder"
        )
    model, fresh, unused = _read(model_class, name, config, **without_pooling(config))
    weights = {f"text_model.{key}": value for key, value in model.state_dict().items()}
    return Tower(name, model.config, weights, fresh, unused)


def tower_statistics(vision: str) -> dict[str, Any]:
    """How the images of a vision tower are rescaled and normalised: settings of an image processor."""
    config = _tower_config(vision)
    if config.model_type == "timm_wrapper":
        return {"image_mean": config.pretrained_cfg["mean"], "image_std": config.pretrained_cfg["std"]}
    try:
        settings = AutoImageProcessor.from_pretrained(vision, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{vision} has no image processor that says mean and deviation of its images: save that of the tower "
            "there, or make an EpmVGImageProcessor with image_mean and image_std"
        ) from error
    return {
        name: settings[name] for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    }


def tower_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a text tower that embeds `vocab_size` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(text, trust_remote_code=False)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of {text} has {len(tokenizer)} tokens, but the tower embeds {vocab_size} only"
        )
    return tokenizer


def loading_table(rows: list[dict[str, Any]]) -> str:
    """The rows that [`model_from_towers`] returns, as a table."""
    lines = [("part", "from", "parameters", "fresh", "not used")]
    for row in rows:
        fresh = "all" if row["source"] is None else in_short(_modules(row["fresh"]))
        lines.append(
            (row["part"], row["source"] or "", f"{row['parameters']:,}", fresh, in_short(_modules(row["unused"])))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def in_short(names: list[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _modules(names: list[str]) -> list[str]:
    """The modules of these tensors, two levels deep at most."""
    return sorted({".".join(name.split(".")[:-1][:2]) or name for name in names})


def _tower_config(name: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # A file must not choose what code runs: attention implementations can be downloaded.
    config._attn_implementation = None
    return config


def _read(
    model_class: type[PreTrainedModel], name: str, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A tower in float32 and evaluation mode, its norms that the checkpoint lacks, and what it lacks itself."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # our own table says what is missing or unused
    try:
        model, report = model_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported with the others
            output_loading_info=True,
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
    fresh = sorted(key for key in report["missing_keys"] if key.startswith(_FRESH_NORMS))
    wrong = {
        "missing": sorted(report["missing_keys"] - set(fresh)),
        "of another shape": sorted(key for key, *_ in report["mismatched_keys"]),
    }
    if any(wrong.values()):
        told = "; ".join(f"{kind}: {in_short(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{name} does not hold the tensors of its {model_class.__name__} ({told})")
    model.config._attn_implementation = None  # as in a new config
    return model.eval(), fresh, sorted(report["unexpected_keys"])


def _load_detr(name: str, config: DetrConfig, out_features: list[str] | None) -> Tower:
    if config.position_embedding_type != "sine":
        raise ValueError(f"{name} has {config.position_embedding_type} position embeddings, expected sine")
    model, fresh, unused = _read(DetrModel, name, config)
    # DETR also keeps the maps in between, for segmentation.
    backbone = model.config.backbone_config
    backbone.out_indices = [backbone.out_indices[-1]]
    if out_features is not None and out_features != backbone.out_features:
        raise ValueError(f"{name} reads the backbone's last map alone: out_features must not be {out_features}")
    # transformers takes timm's module out of its wrapper.
    prefix = "vision_model._backbone." if isinstance(backbone, TimmBackboneConfig) else "vision_model."
    weights = {}
    for key, value in model.state_dict().items():
        if key.startswith("backbone.model."):
            weights[prefix + key.removeprefix("backbone.model.")] = value
        elif key.startswith(("encoder.", "input_projection.")):
            weights[key.replace(".mlp.", ".")] = value
        else:
            unused.append(key)
    return Tower(name, backbone, weights, fresh, unused, {key: getattr(config, key) for key in _DETR_SETTINGS})


def _load_timm(name: str, config: PreTrainedConfig, out_features: list[str] | None) -> Tower:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'the timm model {name} needs timm: pip install "epmvg_hf[train]"') from error

    if out_features is not None:
        raise ValueError(f"{name} is a timm model, whose last map is used: out_features must not be {out_features}")
    place = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    model = timm.create_model(place, pretrained=True, features_only=True, out_indices=[-1])
    weights = {f"vision_model._backbone.{key}": value for key, value in model.state_dict().items()}
    backbone = TimmBackboneConfig(backbone=config.architecture, out_indices=[-1])
    return Tower(name, backbone, weights)


def _stride(tower: Tower, image_size: int) -> int:
    """Pixels per cell of the last feature map, which must fill a canvas of `image_size` pixels."""

    def cells(side: int) -> int:
        return backbone(torch.empty(1, 3, side, side)).feature_maps[-1].shape[-1]

    # On this device tensors have shapes only, which cost nothing.
    with torch.device("meta"), torch.no_grad():
        backbone = AutoBackbone.from_config(tower.config).eval()
        try:
            count = cells(image_size)
        except Exception as error:  # whatever the backbone says about its own image size
            raise ValueError(f"{tower.name} cannot read a canvas of {image_size} pixels: {error}") from error
        try:
            stride = round(16 * image_size / cells(16 * image_size))  # where rounding up to whole cells shows least
        except Exception:  # a backbone for images of one size
            stride = round(image_size / count)
    if count * stride != image_size:
        raise ValueError(
            f"image_size is {image_size}, not a multiple of the {stride} pixels that a cell of {tower.name} has: "
            f"take {max(1, image_size // stride) * stride} or {(image_size // stride + 1) * stride}"
        )
    return stride


def _check_text_length(text_model: PreTrainedModel, name: str, max_text_length: int) -> None:
    try:
        with torch.no_grad():
            text_model(input_ids=torch.full((1, max_text_length), text_model.config.vocab_size - 1))
    except (IndexError, RuntimeError, ValueError) as error:  # each tower has its own
        raise ValueError(f"max_text_length is {max_text_length}, more tokens than {name} has positions for") from error


def _rows(model: PreTrainedModel, vision: Tower, text: Tower) -> list[dict[str, Any]]:
    towers = {key.split(".")[0]: tower for tower in (vision, text) for key in tower.weights}
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameters[name.removeprefix(f"{model.base_model_prefix}.").split(".")[0]] += parameter.numel()
    rows = []
    for part, count in parameters.items():
        row: dict[str, Any] = {"part": part, "source": None, "parameters": count, "fresh": [], "unused": []}
        if part in towers:
            row["source"] = towers[part].name
        if part in ("vision_model", "text_model"):
            row.update(fresh=towers[part].fresh, unused=towers[part].unused)
        rows.append(row)
    return rows


class FromTowersMixin:
    """Lets a model start from pretrained towers."""

    @overload
    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        out_features: list[str] | None = None,
        output_loading_info: Literal[False] = False,
        **config: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        out_features: list[str] | None = None,
        *,
        output_loading_info: Literal[True],
        **config: Any,
    ) -> tuple[Self, list[dict[str, Any]]]: ...

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        out_features: list[str] | None = None,
        output_loading_info: bool = False,
        **config: Any,
    ) -> Self | tuple[Self, list[dict[str, Any]]]:
        r"""
        A new model whose towers are pretrained; the fusion transformer and whatever else no checkpoint holds are
        fresh. A table of it is logged. `EpmVGProcessor.from_vision_text_pretrained` makes the processor to it.

        Args:
            vision (`str`): folder or Hub id of a DETR (its backbone and encoder), a CLIP or a ViT, a timm model, or
                anything that `AutoBackbone` takes.
            text (`str`): folder or Hub id of a BERT, RoBERTa, DistilBERT, CLIP, or another text encoder.
            out_features (`list[str]`, *optional*): the backbone's feature maps to use, such as `["stage1", "stage4",
                "stage8", "stage12"]` for CLIP-VG's of ViT-B/16; by default the last one.
            output_loading_info (`bool`, *optional*, defaults to `False`): also return the table's rows.
            config: settings of [`EpmVGConfig`] other than the towers' and `backbone_stride`. Those of its encoder come
                from a DETR; `image_size` is by default that of a CLIP or ViT, else 640.

        Returns:
            The model in evaluation mode, float32; with `output_loading_info` a tuple with a list of dictionaries:
            `part`, `source` (`None` if fresh), `parameters`, and the names of tensors `fresh` and `unused`.

        Raises:
            ValueError: a checkpoint is no such tower, or lacks tensors; `image_size` is not a multiple of the
                backbone's stride; `max_text_length` is beyond the text tower's positions; a setting contradicts
                DETR's.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGForVisualGrounding

        >>> model, rows = EpmVGForVisualGrounding.from_vision_text_pretrained(
        ...     "facebook/detr-resnet-50", "google-bert/bert-base-uncased", output_loading_info=True
        ... )
        >>> [row["part"] for row in rows if row["source"] is not None]  # the others are fresh
        ['vision_model', 'input_projection', 'encoder', 'text_model']
        ```
        """
        model, rows = model_from_towers(cls, vision, text, out_features, **config)
        return (model, rows) if output_loading_info else model
