"""
Where a CLIP teacher comes from: open_clip's names and tags, the Hub, folders and files.

open_clip builds the model, loads the weights and chooses the tokenizer. This module adds what open_clip does not
promise: the weights are complete or an error says why not, no file can make it execute code or ask a question, and the
global random state, from which the student is initialised, stays as it was.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import open_clip
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.factory import _MODEL_CONFIGS, _find_checkpoint_in_dir
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from transformers import PreTrainedConfig

from ..model.weight_files import check_unpacked_size
from ..utils import in_short
from .convert_clip import load_transformers_clip


class _Source(NamedTuple):
    model_config: dict[str, Any]  # as in open_clip_config.json
    preprocess: dict[str, Any]  # what differs from open_clip's default preprocessing
    weights: Path | dict[str, torch.Tensor]
    # The Hugging Face text tower and tokenizer, if they are not those that model_config names.
    text_tower: str | None = None
    tokenizer: str | None = None


def load_clip(
    name: str, pretrained: str | None, cache_dir: str | None
) -> tuple[CLIP | CustomTextCLIP | CoCa, SimpleTokenizer | HFTokenizer, dict[str, Any]]:
    """
    Loads the model, tokenizer and open_clip configuration of a teacher. Arguments and errors are those of
    [`~ClipTeacher.from_pretrained`].
    """
    source = _find_source(name, pretrained, cache_dir)
    text_config = source.model_config["text_cfg"]
    text_config = {**text_config, "hf_tokenizer_name": source.tokenizer or text_config.get("hf_tokenizer_name")}
    if source.text_tower is not None:
        text_config["hf_model_name"] = source.text_tower
    # open_clip makes models and tokenizers by the name of a configuration. Its own add_model_config would keep the
    # name for the rest of the process.
    registered = f"teacher-{uuid4()}"
    _MODEL_CONFIGS[registered] = {**source.model_config, "text_cfg": text_config}
    try:
        clip = _build(source, text_config, registered, name)
        return clip, _load_tokenizer(text_config, registered, name, cache_dir), source.model_config
    finally:
        del _MODEL_CONFIGS[registered]


def name_for_cards(name: str) -> str:
    """
    The name of a teacher as a model card may show it: only the last part of a path is kept, because a published card
    must not reveal the folders of this machine.
    """
    prefix, colon, where = name.rpartition(":")
    if prefix == "hf-hub" or not Path(where).exists():
        return name
    return f"{prefix}{colon}{Path(where).resolve().name}"


def _find_source(name: str, pretrained: str | None, cache_dir: str | None) -> _Source:
    kind, _, where = name.partition(":")
    if kind not in ("local-dir", "hf-hub", "transformers"):
        return _find_named_source(name, pretrained, cache_dir)
    if pretrained is not None:
        raise ValueError(f"{name} has its own weights, so pretrained must be None, not {pretrained!r}.")
    if kind == "transformers":
        return _Source(*load_transformers_clip(where, cache_dir), tokenizer=where)
    if kind == "hf-hub":
        config = _download({"hf_hub": f"{where}/open_clip_config.json"}, f"the configuration of {name}", cache_dir)
        # Without a file name, open_clip looks for the names that it gives to weights.
        return _Source(*_read_config(config), _download({"hf_hub": f"{where}/"}, f"the weights of {name}", cache_dir))
    model_config, preprocess = _read_config(Path(where, "open_clip_config.json"))
    weights = _find_checkpoint_in_dir(Path(where))
    if weights is None:
        raise FileNotFoundError(f"the folder {where} has no weights, such as open_clip_model.safetensors.")
    # As in open_clip, the folder's own tokenizer replaces the Hugging Face tokenizer that the configuration names. The
    # configuration of a Hugging Face text tower is replaced likewise, so that such a teacher loads without the Hub.
    has_tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    has_tower = model_config["text_cfg"].get("hf_model_name") and Path(where, "config.json").is_file()
    return _Source(
        model_config, preprocess, Path(weights), where if has_tower else None, where if has_tokenizer else None
    )


def _find_named_source(name: str, pretrained: str | None, cache_dir: str | None) -> _Source:
    """A configuration file or an architecture of open_clip: `pretrained` says where the weights are."""
    if name.endswith(".json"):
        model_config, preprocess = _read_config(Path(name))
        if pretrained is None:
            raise ValueError(f"{name} has no weights of its own: pretrained must be the path of a file of weights.")
        return _Source(model_config, preprocess, Path(pretrained))
    architecture = name.replace("/", "-")  # OpenAI writes ViT-B/32 for open_clip's ViT-B-32
    model_config = open_clip.get_model_config(architecture)
    if model_config is None:
        raise ValueError(f"{name} is neither an open_clip architecture nor the path of a .json file.")
    if pretrained is not None and open_clip.is_pretrained_cfg(architecture, pretrained):
        tag = open_clip.get_pretrained_cfg(architecture, pretrained)
        # For weights that were trained with QuickGELU, open_clip only warns and then runs them with GELU.
        model_config["quick_gelu"] = model_config.get("quick_gelu", False) or tag.get("quick_gelu", False)
        return _Source(model_config, tag, _download(tag, f"the weights {pretrained} of {name}", cache_dir))
    if pretrained is None or not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "of which it has none"
        raise ValueError(f"{name} needs pretrained, a file of weights or a tag ({tags}), not {pretrained!r}.")
    return _Source(model_config, {}, Path(pretrained))


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model configuration and preprocessing; a file that is a bare model configuration has no preprocessing."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model_config = content.get("model_cfg", content)
        kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
        missing = [key for key, kind in kinds.items() if not isinstance(model_config.get(key), kind)]
    except (ValueError, AttributeError) as error:  # no JSON, or no JSON object
        raise ValueError(f"{path} is not an open_clip model configuration: {in_short(error)}") from error
    if missing:
        raise ValueError(f"{path} is not an open_clip model configuration: it lacks {', '.join(missing)}.")
    return model_config, content.get("preprocess_cfg", {})


def _download(where: dict[str, Any], what: str, cache_dir: str | None) -> Path:
    try:
        return Path(open_clip.download_pretrained(where, cache_dir=cache_dir))
    except Exception as error:  # network, Hub and disk fail in many ways
        raise OSError(f"{what} could not be downloaded: {in_short(error)}") from error


def _build(source: _Source, text_config: dict[str, Any], registered: str, name: str) -> CLIP | CustomTextCLIP | CoCa:
    if isinstance(source.weights, Path):
        _check_weights(source.weights)
    try:
        _check_text_tower(text_config)
        # open_clip first draws random weights. That must not use up random numbers: with the same seed, a student
        # starts from the same weights with and without a teacher.
        with torch.random.fork_rng(devices=[]):
            if isinstance(source.weights, Path):
                settings = {**source.preprocess, "size": None}  # the size is always that of the vision tower
                return open_clip.create_model(
                    registered, str(source.weights), require_pretrained=True, force_preprocess_cfg=settings
                )
            clip = open_clip.CLIP(**source.model_config)  # create_model takes no tensors
        clip.load_state_dict(source.weights)
        open_clip.set_model_preprocess_cfg(clip, {**source.preprocess, "size": clip.visual.image_size})
        return clip
    except Exception as error:  # configurations and files can be wrong in any way
        file = f" with the weights {source.weights}" if isinstance(source.weights, Path) else ""
        raise ValueError(f"open_clip cannot build {name}{file}: {in_short(error)}") from error


def _check_weights(path: Path) -> None:
    """
    Raises an error for a file that is missing or that holds more than tensors. open_clip loads with
    `weights_only=True` too, but after a `TypeError`, which a crafted file can provoke, it loads again without it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}.")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"weights must be a file .safetensors, .pt, .pth or .bin, not {path}.")
    check_unpacked_size(path)
    try:
        if path.suffix != ".safetensors":
            # Mapping the file, which only an archive allows, avoids reading the weights twice.
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's own message would tell how to run the code
        raise ValueError(
            f"{path} is damaged or holds more than a state dict of tensors, and is not loaded."
        ) from error


def _check_text_tower(text_config: dict[str, Any]) -> None:
    """
    Raises an error for a Hugging Face text tower that comes with code, or asks for an attention kernel to be
    downloaded: open_clip has no option to refuse them, and transformers would ask the user in the middle of a run.
    """
    tower = text_config.get("hf_model_name")
    settings = PreTrainedConfig.get_config_dict(tower)[0] if tower else {}
    if code := settings.keys() & {"auto_map", "attn_implementation", "_attn_implementation"}:
        raise ValueError(f"its text tower {tower} asks for code by {', '.join(sorted(code))}, which is not run.")


def _load_tokenizer(
    text_config: dict[str, Any], registered: str, name: str, cache_dir: str | None
) -> SimpleTokenizer | HFTokenizer:
    hf_tokenizer = text_config["hf_tokenizer_name"]
    # Without this option, a downloaded configuration could allow code, or transformers might ask in the middle of a
    # run.
    options = {"trust_remote_code": False} if hf_tokenizer else {}
    try:
        tokenizer = open_clip.get_tokenizer(registered, cache_dir=cache_dir, **options)
        tokens = tokenizer(["a"])
    except Exception as error:  # missing files, no network, wrong options
        raise ValueError(f"the tokenizer of {name} could not be loaded: {in_short(error)}") from error
    # From a folder without a vocabulary, AutoTokenizer makes a tokenizer that knows no words.
    if hf_tokenizer and tokenizer.tokenizer.vocab_size <= len(tokenizer.tokenizer.all_special_ids):
        raise ValueError(f"the tokenizer of {name} has no words: {hf_tokenizer} lacks a tokenizer.json or vocab.json.")
    # Without its end token, such a tower would return the embedding of the first token, which all texts share.
    end = text_config.get("eos_id", 2) if text_config.get("pool_type") == "eos" else None
    if end is not None and end not in tokens:
        raise ValueError(
            f"the tokenizer of {name} does not end a text with the token {end}, which the text tower pools."
        )
    return tokenizer
