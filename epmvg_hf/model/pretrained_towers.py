"""New grounding models that start from a pretrained vision tower and a pretrained text tower."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import WARNING, LogRecord
from pathlib import Path
from threading import get_ident
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

# The norms that backbones of transformers apply to their feature maps. Most checkpoints were trained without these
# norms, so it is no error if they are missing. New ones have the weight 1 and the bias 0.
_FRESH_NORMS = "hidden_states_norms."

# The sizes of DETR's encoder. The settings of EpmVGConfig have the same names.
_DETR_SETTINGS = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "activation_function")

# The settings of an image processor that say how a tower's images are rescaled and normalised.
_NORMALISATION_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class FromTowersMixin:
    """Adds the constructor that starts from pretrained towers."""

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
        Makes a new model whose towers are pretrained. The fusion transformer, and whatever else the checkpoints do not
        hold, is newly initialised; a table that is logged says what came from where.
        [`~EpmVGProcessor.from_vision_text_pretrained`] makes the processor for it.

        Args:
            vision (`str`): folder or Hub id of a DETR (its backbone and encoder are used), a CLIP, a ViT, a timm
                model, or any backbone that `AutoBackbone` accepts.
            text (`str`): folder or Hub id of a BERT, RoBERTa, DistilBERT, CLIP, or another text encoder.
            out_features (`list[str]`, *optional*): the feature maps of the backbone to use, by default the last one.
                For CLIP-VG's maps of ViT-B/16 it is `["stage1", "stage4", "stage8", "stage12"]`. The maps of a timm
                model have timm's names, such as `["blocks.4", "blocks.6"]` of an EfficientNet.
            output_loading_info (`bool`, *optional*, defaults to `False`): whether to return the rows of the table too.
            config: settings of [`EpmVGConfig`], except for the towers. By default, `backbone_stride` is that of the
                last feature map. If `vision` is a DETR, the sizes of the encoder are the DETR's. The default of
                `image_size` is that of a CLIP or ViT, and 640 for other towers.

        Returns:
            The model in evaluation mode, float32. With `output_loading_info` a tuple of the model and a list with one
            dictionary for each part of the model: `part`, `source` (`None` if it is newly initialised), `parameters`
            (their number), and the names of tensors that the checkpoint lacks (`fresh`) or that the model has no place
            for (`unused`).

        Raises:
            ValueError: a checkpoint is not such a tower, or lacks tensors; `image_size` is not a multiple of the
                backbone's stride; the text tower has fewer positions than `max_text_length`; or a setting contradicts
                the DETR.

        Example:

        ```python
        >>> from epmvg_hf import EpmVGForVisualGrounding

        >>> model, rows = EpmVGForVisualGrounding.from_vision_text_pretrained(
        ...     "facebook/detr-resnet-50", "google-bert/bert-base-uncased", output_loading_info=True
        ... )
        >>> [row["part"] for row in rows if row["source"] is not None]  # the other parts are newly initialised
        ['vision_model', 'input_projection', 'encoder', 'text_model']
        ```
        """
        model, rows = model_from_towers(cls, vision, text, out_features, **config)
        return (model, rows) if output_loading_info else model


@dataclass
class Tower:
    """
    The parts of a pretrained checkpoint that a grounding model uses.

    Args:
        name (`str`): folder or Hub id of the checkpoint.
        config (`PreTrainedConfig`): the `backbone_config` or `text_config` of the grounding model.
        weights (`dict[str, torch.Tensor]`): the tensors by their names in `EpmVGModel`.
        fresh (`list[str]`): names of the tower's tensors that the checkpoint lacks.
        unused (`list[str]`): names of the checkpoint's tensors that a grounding model has no place for.
        settings (`dict`): settings of [`EpmVGConfig`] without which the tensors do not fit.
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
    """Does the work of [`~EpmVGModel.from_vision_text_pretrained`]; returns the model and the rows of the table."""
    vision_tower, text_tower = load_vision_tower(vision, out_features), load_text_tower(text)
    for name, value in vision_tower.settings.items():
        if config.setdefault(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}, but {vision} was trained with {value!r}")
    if isinstance(vision_tower.config, PatchBackboneConfig):
        patches: PreTrainedConfig = vision_tower.config.tower_config
        config.setdefault("image_size", patches.image_size)
    stride = config.pop("backbone_stride", None)
    model_config = EpmVGConfig(backbone_config=vision_tower.config, text_config=text_tower.config, **config)
    model_config.backbone_stride = _stride(vision_tower, model_config.image_size, stride)

    model = model_class(model_config).eval()
    base, weights = model.base_model, vision_tower.weights | text_tower.weights
    missing, unexpected = base.load_state_dict(weights, strict=False)
    parts = {name.split(".")[0] for name in weights}
    # The frozen batch norms of DETR do not count batches, so their counters may be missing.
    missing = [name for name in missing if name.split(".")[0] in parts and not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"{vision} and {text} do not hold the tensors that their configs describe: missing "
            f"{list_first(missing)}; unexpected {list_first(unexpected)}"
        )
    _check_text_length(base.text_model, text, model_config.max_text_length)
    rows = _loading_rows(model, vision_tower, text_tower)
    logger.warning("The towers are loaded, all other parts have yet to be trained:\n%s", _loading_table(rows))
    return model, rows


def load_vision_tower(name: str, out_features: list[str] | None = None) -> Tower:
    """
    Loads the vision tower of a checkpoint.

    Args:
        name (`str`): folder or Hub id of a DETR, CLIP, ViT, timm model or backbone that `AutoBackbone` accepts.
        out_features (`list[str]`, *optional*): the feature maps of the backbone to use, by default the last one.

    Raises:
        ValueError: it is none of these, or tensors are missing or have another shape.
    """
    config = _tower_config(name)
    if isinstance(config, CLIPConfig):
        config = config.vision_config
    if isinstance(config, DetrConfig):
        return _load_detr(name, config, out_features)
    if config.model_type == "timm_wrapper":
        return _load_timm(name, config, out_features)
    if isinstance(config, CLIPVisionConfig | ViTConfig):
        model, fresh, unused = _load_checked(MODEL_MAPPING[type(config)], name, config, **without_pooling(config))
        tensors = {f"tower.{key}": value for key, value in model.state_dict().items()}
        # CLIP applies this norm to the class token alone, which a grounding model does not read.
        pooled = [key for key in tensors if key.startswith("tower.post_layernorm.")]
        unused += [key.removeprefix("tower.") for key in pooled]
        tensors = {key: value for key, value in tensors.items() if key not in pooled}
        config = PatchBackboneConfig(tower_config=model.config, out_features=out_features)
    elif type(config) in MODEL_FOR_BACKBONE_MAPPING and not isinstance(config, TimmBackboneConfig):
        config.out_features = out_features or [config.stage_names[-1]]
        if config.to_dict().get("use_mask_token"):
            config.use_mask_token = False  # images are never masked here, so the token would not get a gradient
        model, fresh, unused = _load_checked(MODEL_FOR_BACKBONE_MAPPING[type(config)], name, config)
        tensors, config = model.state_dict(), model.config
    else:
        raise ValueError(
            f"{name} is a {config.model_type!r}, not a vision tower: expected a DETR, CLIP, ViT, timm model or a "
            "backbone that AutoBackbone accepts"
        )
    weights = {f"vision_model.{key}": value for key, value in tensors.items()}
    return Tower(name, config, weights, fresh, unused)


def load_text_tower(name: str) -> Tower:
    """
    Loads the text tower of a checkpoint.

    Args:
        name (`str`): folder or Hub id of a BERT, RoBERTa, DistilBERT, CLIP or another text encoder of `AutoModel`.

    Raises:
        ValueError: it is none of these, or tensors are missing or have another shape.
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
    model, fresh, unused = _load_checked(model_class, name, config, **without_pooling(config))
    weights = {f"text_model.{key}": value for key, value in model.state_dict().items()}
    return Tower(name, model.config, weights, fresh, unused)


def tower_statistics(vision: str) -> dict[str, Any]:
    """How images are rescaled and normalised for a vision tower, as settings of an image processor."""
    config = _tower_config(vision)
    if config.model_type == "timm_wrapper":
        return {"image_mean": config.pretrained_cfg["mean"], "image_std": config.pretrained_cfg["std"]}
    try:
        settings = AutoImageProcessor.from_pretrained(vision, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{vision} has no image processor, which would give the mean and deviation of its images: save the image "
            "processor of the tower there, or make an EpmVGImageProcessor with image_mean and image_std"
        ) from error
    return {name: settings[name] for name in _NORMALISATION_SETTINGS}


def tower_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a text tower; a `ValueError` if it has more tokens than the `vocab_size` that it embeds."""
    tokenizer = AutoTokenizer.from_pretrained(text, trust_remote_code=False)
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of {text} has {len(tokenizer)} tokens, but the tower embeds only {vocab_size}"
        )
    return tokenizer


def _loading_table(rows: list[dict[str, Any]]) -> str:
    """The source of each part of the model, as text in columns."""
    lines = [("part", "from", "parameters", "fresh", "not used")]
    for row in rows:
        fresh = "all" if row["source"] is None else list_first(_modules(row["fresh"]))
        lines.append(
            (row["part"], row["source"] or "", f"{row['parameters']:,}", fresh, list_first(_modules(row["unused"])))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def list_first(names: list[str], limit: int = 4) -> str:
    """The first of the names, and how many more there are: some checkpoints have thousands."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _modules(names: list[str]) -> list[str]:
    """The names of the modules that these tensors belong to, at most two levels deep."""
    return sorted({".".join(name.split(".")[:-1][:2]) or name for name in names})


def _tower_config(name: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # A config can name an attention implementation that is downloaded and run. A file must not decide what code runs.
    config._attn_implementation = None
    return config


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """
    Drops the warnings of transformers about tensors that this thread loads. The verbosity is one for all threads: of
    two that set it and set it back, the second could leave it as the first had set it.
    """
    loading = get_ident()

    def is_other(record: LogRecord) -> bool:
        return record.thread != loading or record.levelno > WARNING

    log = logging.get_logger("transformers.modeling_utils")
    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _load_checked(
    model_class: type[PreTrainedModel], name: str, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """
    Loads a tower in float32 and evaluation mode; also returns the names of new norms that the checkpoint lacks, and of
    tensors in the checkpoint that the tower has no place for.
    """
    with _quiet_loading():  # what transformers would log is in `_loading_table`
        model, report = model_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            weights_only=True,
            ignore_mismatched_sizes=True,  # so that the error below can name them along with missing tensors
            output_loading_info=True,
            **options,
        )
    fresh = sorted(key for key in report["missing_keys"] if key.startswith(_FRESH_NORMS))
    problems = {
        "missing": sorted(report["missing_keys"] - set(fresh)),
        "of another shape": sorted(key for key, *_ in report["mismatched_keys"]),
    }
    if any(problems.values()):
        details = "; ".join(f"{kind}: {list_first(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{name} does not hold the tensors of a {model_class.__name__} ({details})")
    # Loading has set an attention implementation. The grounding model that gets this config chooses its own.
    model.config._attn_implementation = None
    return model.eval(), fresh, sorted(report["unexpected_keys"])


def _load_detr(name: str, config: DetrConfig, out_features: list[str] | None) -> Tower:
    if config.position_embedding_type != "sine":
        raise ValueError(f"{name} has {config.position_embedding_type} position embeddings, expected sine")
    model, fresh, unused = _load_checked(DetrModel, name, config)
    # DETR's backbone also returns earlier maps, which DETR uses for segmentation only.
    backbone = model.config.backbone_config
    backbone.out_indices = [backbone.out_indices[-1]]
    if out_features is not None and out_features != backbone.out_features:
        raise ValueError(
            f"{name} is a DETR, which reads the last map of its backbone: out_features must not be {out_features}"
        )
    # DETR holds the bare module of timm; a TimmBackbone holds it as `_backbone`.
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
    import timm  # takes a second, and most towers do not need it

    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"
    model = timm.create_model(source, pretrained=True, features_only=True)
    names: list[str] = model.feature_info.module_name()  # type: ignore[union-attr, operator]
    if unknown := [feature for feature in out_features or () if feature not in names]:
        raise ValueError(f"{name} has the feature maps {', '.join(names)}, so out_features must not have {unknown[0]}")
    indices = [-1] if out_features is None else sorted(names.index(feature) for feature in out_features)
    model = timm.create_model(source, pretrained=True, features_only=True, out_indices=indices)
    weights = {f"vision_model._backbone.{key}": value for key, value in model.state_dict().items()}
    backbone = TimmBackboneConfig(backbone=config.architecture, out_indices=indices)
    return Tower(name, backbone, weights)


def _stride(tower: Tower, image_size: int, wanted: int | None) -> int:
    """
    Pixels per cell of the last feature map, or `wanted` if one of the maps has it. A `ValueError` if none has, or if
    whole cells do not fill a canvas of `image_size`.
    """

    def cells(side: int) -> list[int]:
        return [level.shape[-1] for level in backbone(torch.empty(1, 3, side, side)).feature_maps]

    # On the meta device tensors have shapes but no values, so this costs nothing.
    with torch.device("meta"), torch.no_grad():
        backbone = AutoBackbone.from_config(tower.config).eval()
        try:
            counts = cells(image_size)
        except Exception as error:  # backbones refuse an image size with errors of many types
            raise ValueError(f"{tower.name} cannot read a canvas of {image_size} pixels: {error}") from error
        try:
            # Some backbones round up to whole cells, which distorts this ratio least on a large canvas.
            strides = [round(16 * image_size / count) for count in cells(16 * image_size)]
        except Exception:  # some backbones only take images of one size
            strides = [round(image_size / count) for count in counts]
    stride = strides[-1] if wanted is None else wanted
    if stride not in strides:
        raise ValueError(
            f"backbone_stride is {stride}, but the feature maps of {tower.name} have cells of "
            f"{', '.join(map(str, strides))} pixels"
        )
    if counts[strides.index(stride)] * stride != image_size:
        raise ValueError(
            f"image_size is {image_size}, not a multiple of the {stride} pixels that a cell of {tower.name} has: "
            f"take {max(1, image_size // stride) * stride} or {(image_size // stride + 1) * stride}"
        )
    return stride


def _check_text_length(text_model: PreTrainedModel, name: str, max_text_length: int) -> None:
    try:
        with torch.no_grad():
            text_model(input_ids=torch.full((1, max_text_length), text_model.config.vocab_size - 1))
    except (IndexError, RuntimeError, ValueError) as error:  # which of them depends on the tower
        raise ValueError(f"max_text_length is {max_text_length}, more tokens than {name} has positions for") from error


def _loading_rows(model: PreTrainedModel, vision: Tower, text: Tower) -> list[dict[str, Any]]:
    """One row for each part of the model, as [`~FromTowersMixin.from_vision_text_pretrained`] returns them."""
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
