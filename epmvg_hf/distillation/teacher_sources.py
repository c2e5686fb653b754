"""What a teacher is made of, and where that comes from: open_clip's names, the Hub, folders, files."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..utils import in_short

if TYPE_CHECKING:
    from open_clip import HFTokenizer, SimpleTokenizer

# The names that open_clip looks for in a folder, best first.
_WEIGHTS_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


@dataclass
class TeacherSource:
    """
    What a teacher is made of.

    Args:
        model_config (`dict`): open_clip's configuration of the model.
        preprocess (`dict`): open_clip's preprocessing, as far as it is not the default.
        weights (`Path` or `dict[str, torch.Tensor]`): a file, or the tensors themselves.
        hf_tokenizer (`str` or `None`):
            The name or folder of a Hugging Face tokenizer, or `None` for the one of OpenAI's CLIP, which is part of
            open_clip.
        cache_dir (`str` or `None`): where downloads are kept.
    """

    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path | dict[str, torch.Tensor]
    hf_tokenizer: str | None
    cache_dir: str | None


def find_source(name: str, pretrained: str | None, cache_dir: str | None) -> TeacherSource:
    """
    What a name means, with the arguments of [`~ClipTeacher.from_pretrained`]. What is not on this machine is
    downloaded.

    Raises:
        `FileNotFoundError`: A file or folder is missing.
        `OSError`: A download failed.
        `ValueError`: A name or tag is unknown, `pretrained` is missing or one too many, or a configuration is none.
    """
    own_weights = name.startswith(("local-dir:", "hf-hub:", "transformers:"))
    if own_weights and pretrained is not None:
        raise ValueError(f"{name} has its own weights, so pretrained must be None, not {pretrained!r}.")
    if name.startswith("local-dir:"):
        return _folder_source(Path(name.removeprefix("local-dir:")), cache_dir)
    if name.startswith("hf-hub:"):
        return _hub_source(name, cache_dir)
    if name.startswith("transformers:"):
        return _transformers_source(name, cache_dir)
    if name.endswith(".json"):
        return _config_file_source(Path(name), pretrained, cache_dir)
    return _architecture_source(name, pretrained, cache_dir)


def without_folders(name: str) -> str:
    """
    A name or path that [`~ClipTeacher.from_pretrained`] takes, without where on this machine it is: cards show it to
    anyone.
    """
    prefix, colon, where = name.rpartition(":")
    if prefix == "hf-hub" or not Path(where).exists():
        return name
    return f"{prefix}{colon}{Path(where).resolve().name}"


def _folder_source(folder: Path, cache_dir: str | None) -> TeacherSource:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    model_config, preprocess = _read_config(folder / "open_clip_config.json")
    weights = next((folder / name for name in _WEIGHTS_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"the folder {folder} has no weights, such as {_WEIGHTS_NAMES[0]}.")
    # As in open_clip, whatever the name says: a folder brings its tokenizer with it.
    hf_tokenizer = str(folder) if model_config["text_cfg"].get("hf_tokenizer_name") else None
    return TeacherSource(model_config, preprocess, weights, hf_tokenizer, cache_dir)


def _hub_source(name: str, cache_dir: str | None) -> TeacherSource:
    repository = name.removeprefix("hf-hub:")
    config = _download({"hf_hub": f"{repository}/open_clip_config.json"}, f"the configuration of {name}", cache_dir)
    model_config, preprocess = _read_config(config)
    # Without a file name open_clip looks for the safetensors file first.
    weights = _download({"hf_hub": f"{repository}/"}, f"the weights of {name}", cache_dir)
    hf_tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    return TeacherSource(model_config, preprocess, weights, hf_tokenizer, cache_dir)


def _transformers_source(name: str, cache_dir: str | None) -> TeacherSource:
    from .convert_clip import load_transformers_clip

    where = name.removeprefix("transformers:")
    model_config, preprocess, weights = load_transformers_clip(where, cache_dir)
    # The tokenizer's place is not part of the configuration, and so not of the fingerprint.
    return TeacherSource(model_config, preprocess, weights, where, cache_dir)


def _config_file_source(config: Path, pretrained: str | None, cache_dir: str | None) -> TeacherSource:
    model_config, preprocess = _read_config(config)
    if pretrained is None:
        raise ValueError(f"{config} has no weights of its own: pretrained must be the path of a file of weights.")
    hf_tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    return TeacherSource(model_config, preprocess, Path(pretrained), hf_tokenizer, cache_dir)


def _architecture_source(name: str, pretrained: str | None, cache_dir: str | None) -> TeacherSource:
    import open_clip

    # OpenAI writes ViT-B/32, open_clip ViT-B-32, and open_clip takes both.
    architecture = name.replace("/", "-")
    model_config = open_clip.get_model_config(architecture)
    if model_config is None:
        raise ValueError(f"{name} is neither an open_clip architecture nor the path of a .json file.")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
    if pretrained is None:
        raise ValueError(f"{name} needs pretrained: a file of weights, or a tag (for this architecture: {tags}).")

    preprocess = {}
    if open_clip.is_pretrained_cfg(architecture, pretrained):
        preprocess = open_clip.get_pretrained_cfg(architecture, pretrained)
        weights = _download(preprocess, f"the weights {pretrained} of {name}", cache_dir)
        # open_clip only warns when weights that were trained with QuickGELU would be run with GELU.
        model_config["quick_gelu"] = model_config.get("quick_gelu", False) or preprocess.get("quick_gelu", False)
    elif Path(pretrained).is_file():
        weights = Path(pretrained)
    else:
        raise ValueError(f"{pretrained!r} is neither a file nor a tag of {name}, whose tags are: {tags}.")
    hf_tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    return TeacherSource(model_config, preprocess, weights, hf_tokenizer, cache_dir)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model configuration and the preprocessing in a file; a bare model configuration has no preprocessing."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an open_clip model configuration: it is no JSON object.")
    model_config = content.get("model_cfg", content)
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    missing = [key for key, kind in kinds.items() if not isinstance(model_config.get(key), kind)]
    if missing:
        raise ValueError(f"{path} is not an open_clip model configuration: it lacks {', '.join(missing)}.")
    return model_config, content.get("preprocess_cfg", {})


def _download(where: dict[str, Any], what: str, cache_dir: str | None) -> Path:
    import open_clip

    try:
        return Path(open_clip.download_pretrained(where, cache_dir=cache_dir))
    except Exception as error:  # whatever the network, the Hub or the disk had to say
        raise OSError(f"{what} could not be downloaded: {in_short(error)}") from error


def build_clip(source: TeacherSource, name: str) -> nn.Module:
    """
    The model with its weights; as in `open_clip.create_model`, which takes no configuration but registered ones.
    `name` is for error messages.

    Raises:
        `FileNotFoundError`: There is no file of weights.
        `ValueError`: open_clip cannot build such a model, or the weights are not exactly its own or might run code.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    if isinstance(source.weights, Path):
        check_weights(source.weights)
    config = dict(source.model_config)
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if not custom_text:
        architecture = open_clip.CLIP
    elif "multimodal_cfg" in config:
        architecture = open_clip.CoCa
    else:
        architecture = open_clip.CustomTextCLIP
    # All weights come from the one file, so the towers need not load any first.
    config["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    config["text_cfg"] = {**config["text_cfg"], "hf_model_pretrained": False}
    try:
        # The random numbers that the weights replace are not taken from those of the student: with the same seed a
        # run with a teacher starts like one without.
        with torch.random.fork_rng(devices=[]):
            clip = architecture(**config)
    except Exception as error:  # a configuration can be wrong in any way
        raise ValueError(f"open_clip cannot build {name}: {in_short(error)}") from error
    try:
        if isinstance(source.weights, Path):
            open_clip.load_checkpoint(clip, str(source.weights), strict=True, weights_only=True)
        else:
            clip.load_state_dict(source.weights, strict=True)
    except Exception as error:  # so can a file
        where = source.weights if isinstance(source.weights, Path) else "what was converted"
        raise ValueError(f"{where} does not hold the weights of {name}: {in_short(error)}") from error
    preprocess = {**merge_preprocess_dict(PreprocessCfg(), source.preprocess), "size": clip.visual.image_size}
    open_clip.set_model_preprocess_cfg(clip, preprocess)
    return clip


def check_weights(path: Path) -> None:
    """
    Raises for a file that is not there, or that is not known to be loaded without running code from it. open_clip
    loads with `weights_only=True` too, but on a `TypeError` tries again without saying so.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}.")
    if path.suffix == ".safetensors":
        return
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"weights must be a file .safetensors, .pt, .pth or .bin, not {path}.")
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            if any(PurePosixPath(member).name == "constants.pkl" for member in archive.namelist()):
                raise ValueError(f"{path} is a TorchScript archive, which holds code: save its state dict instead.")
    try:
        # Mapped, not read, so that weights are not read twice.
        torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # torch's own message would tell how to run the code
        raise ValueError(f"{path} is damaged or holds more than tensors, such as code, and is not loaded.") from error


def load_tokenizer(source: TeacherSource, name: str) -> "SimpleTokenizer | HFTokenizer":
    """
    The model's tokenizer; as in `open_clip.get_tokenizer`, which takes no configuration but registered ones. `name` is
    what [`~ClipTeacher.from_pretrained`] was given.

    Raises:
        `ValueError`: The tokenizer cannot be loaded, would have to run code, or ends texts with another token than the
            text tower looks for.
    """
    from open_clip import SimpleTokenizer
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    text_config = source.model_config["text_cfg"]
    context_length = text_config.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text_config.get("tokenizer_kwargs") or {}
    if "trust_remote_code" in options:
        raise ValueError(f"{name} is refused because the options of its tokenizer include trust_remote_code.")
    try:
        if source.hf_tokenizer is None:
            return SimpleTokenizer(context_length=context_length, **options)
        tokenizer = HFTokenizer(
            source.hf_tokenizer,
            context_length=context_length,
            cache_dir=source.cache_dir,
            tokenizer_mode=text_config.get("tokenizer_mode"),
            # Not even after a question, which would halt a run.
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # missing files, no network, wrong options
        raise ValueError(f"the tokenizer of {name} could not be loaded: {in_short(error)}") from error
    # Where there are no such files, AutoTokenizer may make a tokenizer of the right class without any words.
    if tokenizer.tokenizer.vocab_size <= len(tokenizer.tokenizer.all_special_ids):
        raise ValueError(
            f"the tokenizer of {name} could not be loaded: {source.hf_tokenizer} has no file with its words, such as "
            "tokenizer.json or vocab.json."
        )
    # Two files of transformers must agree here, or all texts would get the embedding of their first token.
    from_transformers, eos_id = name.startswith("transformers:"), text_config.get("eos_id")
    if from_transformers and eos_id is not None and eos_id not in tokenizer(["a"]):
        raise ValueError(
            f"the tokenizer of {name} does not end a text with the token {eos_id}, whose embedding the text tower is "
            "to return."
        )
    return tokenizer
