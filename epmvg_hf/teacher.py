"""A frozen CLIP, whose image-text space the student is taught; needed in training only."""

import hashlib
import json
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .extras import needs_extra

if TYPE_CHECKING:
    from open_clip import CLIP, CoCa, CustomTextCLIP, HFTokenizer, SimpleTokenizer
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

# Part of every fingerprint: to be raised when the same weights and pixels are to give other embeddings.
_OUTPUTS_VERSION = 1

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
class TeacherOutput(ModelOutput):
    """
    Outputs of [`ClipTeacher`] for B images and N expressions, all in one space of `e` dimensions, all of length 1.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`):
            One embedding per image.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`):
            One embedding per expression.
        patch_embeds (`torch.FloatTensor` of shape `(B, grid_height, grid_width, e)`, *optional*):
            One embedding per cell of the teacher's grid, which covers the whole canvas; only with `output_patches`.

    Example:

    ```python
    >>> import torch

    >>> output = teacher(torch.zeros(1, 3, 64, 64), ["the red star", "a circle"])
    >>> output.image_embeds.shape, output.text_embeds.shape, output.patch_embeds.shape
    (torch.Size([1, 128]), torch.Size([2, 128]), torch.Size([1, 8, 8, 128]))
    ```
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor = None  # type: ignore[assignment] # always there; ModelOutput wants defaults but for one
    patch_embeds: torch.Tensor | None = None


class ClipTeacher(nn.Module):
    """
    A frozen open_clip model that embeds images, their patches, and expressions in one space. It has its own
    resolution, mean, standard deviation and tokenizer, and wants pixels and strings. It never trains: `train()` has no
    effect, nothing has a gradient. It computes in the dtype of its weights, or in the caller's autocast, and returns
    float32.

    Usually made with [`~ClipTeacher.from_pretrained`].

    Args:
        clip (`open_clip.CLIP`, `open_clip.CustomTextCLIP` or `open_clip.CoCa`):
            The model with its weights and its preprocessing, as `open_clip.create_model` gives it.
        tokenizer (`open_clip.SimpleTokenizer` or `open_clip.HFTokenizer`):
            The tokenizer that open_clip has for this model.
        model_config (`dict`):
            The model's open_clip configuration.
        name (`str`, *optional*):
            What model cards call it.

    Attributes:
        name (`str` or `None`): what it was loaded by, such as `"ViT-B-32 openai"`; of paths only the last name.
        embed_dim (`int`): dimensions of the image-text space.
        image_size (`int`): side of the teacher's square input in pixels.

    Raises:
        ValueError: the model's input is not square.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf import ClipTeacher

    >>> teacher = ClipTeacher.from_pretrained("local-dir:model_cards/clip-tiny-shapes")
    >>> teacher.embed_dim, teacher.image_size
    (128, 256)
    >>> teacher(torch.zeros(1, 3, 64, 64), ["the red star"]).patch_embeds.shape
    torch.Size([1, 8, 8, 128])
    ```
    """

    def __init__(
        self,
        clip: "CLIP | CustomTextCLIP | CoCa",
        tokenizer: "SimpleTokenizer | HFTokenizer",
        model_config: dict[str, Any],
        name: str | None = None,
    ):
        super().__init__()
        from open_clip import get_model_preprocess_cfg

        preprocess = get_model_preprocess_cfg(clip)
        size = preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"a teacher must see squares, as the student's canvas is one, not {height} x {width}.")

        self.clip = clip
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.name = name
        self.embed_dim = model_config["embed_dim"]
        self.image_size = height
        self.image_mean = tuple(map(float, preprocess["mean"]))
        self.image_std = tuple(map(float, preprocess["std"]))
        # Anything but "bilinear" is bicubic in open_clip, "random" included.
        self.interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
        # Several times as fast for a ResNet in bfloat16 on a CPU, the same for a ViT.
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(cls, name: str, pretrained: str | None = None, cache_dir: str | None = None) -> "ClipTeacher":
        """
        Loads a teacher with all of its weights, or raises. No file can make it run code: weights are `.safetensors`,
        or `.pt`, `.pth` and `.bin` that hold nothing but tensors.

        Args:
            name (`str`):
                - an architecture that open_clip knows, such as `"ViT-B-32"`,
                - the path of a `.json` file with an open_clip model configuration (`embed_dim`, `vision_cfg`,
                  `text_cfg`, or these within `model_cfg`, beside a `preprocess_cfg`),
                - `"local-dir:/a/folder"` with `open_clip_config.json` and the weights, and, where the configuration
                  names a Hugging Face tokenizer, that tokenizer,
                - `"hf-hub:organization/repository"`, a Hub repository of that content, or
                - `"transformers:/a/folder"` or `"transformers:organization/repository"`, a folder or Hub repository
                  with a `CLIPModel` of transformers (`config.json` of the `model_type` `"clip"`, and the weights), its
                  tokenizer and its image processor, such as `"transformers:openai/clip-vit-base-patch32"`. It is
                  converted to the `open_clip.CLIP` that gives the same embeddings.
            pretrained (`str`, *optional*):
                For an architecture one of open_clip's tags, such as `"openai"`, or the path of a file of weights; for
                a `.json` file such a path. A folder or repository has its own weights. A tag also decides between
                GELU and QuickGELU; with a path the architecture must be the right one (`"ViT-B-32-quickgelu"`).
                Position tables of another resolution are resampled, by open_clip.
            cache_dir (`str`, *optional*):
                Where downloads are kept. Defaults to the cache of `huggingface_hub`.

        Raises:
            `ImportError`: open_clip is not installed.
            `FileNotFoundError`: A file or folder is missing.
            `OSError`: A download failed, or after `"transformers:"` a file is neither in the folder nor on the Hub.
            `ValueError`: A name or tag is unknown, `pretrained` is missing or one too many, a file is not what it
                should be or would have to run code, its tensors are not exactly those of the model, or open_clip has
                no such `CLIPModel`.

        Example:

        ```python
        >>> from epmvg_hf import ClipTeacher

        >>> teacher = ClipTeacher.from_pretrained("local-dir:model_cards/clip-tiny-shapes")  # or "ViT-B-32", "openai"
        >>> teacher.encode_texts(["the red circle", "the star on the left"]).shape
        torch.Size([2, 128])
        ```
        """
        with needs_extra("ClipTeacher", "teacher"):
            import open_clip  # noqa: F401

        own_weights = name.startswith(("local-dir:", "hf-hub:", "transformers:"))
        if own_weights and pretrained is not None:
            raise ValueError(f"{name} has its own weights, so pretrained must be None, not {pretrained!r}.")
        if name.startswith("local-dir:"):
            source = _folder_source(Path(name.removeprefix("local-dir:")), cache_dir)
        elif name.startswith("hf-hub:"):
            source = _hub_source(name, cache_dir)
        elif name.startswith("transformers:"):
            source = _transformers_source(name, cache_dir)
        elif name.endswith(".json"):
            source = _config_file_source(Path(name), pretrained, cache_dir)
        else:
            source = _architecture_source(name, pretrained, cache_dir)
        shown = " ".join(_without_folders(part) for part in (name, pretrained) if part is not None)
        return cls(_build(source, name), _tokenizer(source, name), source.model_config, shown)

    def train(self, mode: bool = True) -> "ClipTeacher":
        """
        Stays in evaluation mode, also when a module that holds it is set to training.

        Example:

        ```python
        >>> teacher.train().training
        False
        ```
        """
        return super().train(False)

    def forward(
        self, pixel_values: torch.Tensor, expressions: list[str], output_patches: bool = True
    ) -> TeacherOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, S, S)`):
                See [`~ClipTeacher.encode_images`].
            expressions (`list[str]`):
                N expressions, in the order of the caller's `image_index`, which the teacher need not know.
            output_patches (`bool`, *optional*, defaults to `True`):
                Whether to return `patch_embeds`.

        Returns:
            [`TeacherOutput`]

        Raises:
            ValueError: see [`~ClipTeacher.encode_images`] and [`~ClipTeacher.encode_texts`].

        Example:

        ```python
        >>> canvas = processor.image_processor.unnormalize(processor(images=image)["pixel_values"])
        >>> output = teacher(canvas, ["the green triangle", "the star"])
        >>> (output.text_embeds @ output.image_embeds.T).shape  # cosines of 2 expressions and 1 image
        torch.Size([2, 1])
        ```
        """
        image_embeds, patch_embeds = self.encode_images(pixel_values, output_patches)
        return TeacherOutput(
            image_embeds=image_embeds, text_embeds=self.encode_texts(expressions), patch_embeds=patch_embeds
        )

    @torch.no_grad()
    def encode_images(
        self, pixel_values: torch.Tensor, output_patches: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, S, S)`):
                RGB in [0, 1]: the student's canvas, letterbox padding and augmentation included, *before* the
                student's normalisation. S need not be `image_size`.
            output_patches (`bool`, *optional*, defaults to `True`):
                Whether to return patch embeddings, which not every vision tower has.

        Returns:
            `tuple`: `image_embeds` `(B, e)`, as `encode_image` of open_clip gives them, and `patch_embeds`
            `(B, grid_height, grid_width, e)` or `None`.

        Raises:
            `ValueError`: The pixels are no such canvas, or patches of this vision tower are not known to lie in the
                image-text space.

        Example:

        ```python
        >>> import torch

        >>> image_embeds, patch_embeds = teacher.encode_images(torch.zeros(2, 3, 64, 64), output_patches=False)
        >>> image_embeds.shape, patch_embeds
        (torch.Size([2, 128]), None)
        ```
        """
        pixels = self._preprocess(pixel_values)
        if not output_patches:
            return _unit(self.clip.encode_image(pixels, normalize=False)), None
        pooled, patches = pooled_and_patches(self.clip.visual, pixels)
        return _unit(pooled), _unit(patches)

    @torch.no_grad()
    def encode_texts(self, expressions: list[str]) -> torch.Tensor:
        """
        Args:
            expressions (`list[str]`): N expressions, of which equal ones are computed once; N may be 0.

        Returns:
            `torch.FloatTensor` of shape `(N, e)`: `text_embeds`, of length 1.

        Raises:
            `ValueError`: It is one string, not a list.

        Example:

        ```python
        >>> text_embeds = teacher.encode_texts(["the red star", "the blue star"])
        >>> text_embeds.shape, text_embeds.norm(dim=-1)
        (torch.Size([2, 128]), tensor([1.0000, 1.0000]))
        ```
        """
        if isinstance(expressions, str):
            raise ValueError(f"expressions must be a list of strings, not the string {expressions!r}.")
        device = self.clip.logit_scale.device
        if not expressions:
            return torch.zeros(0, self.embed_dim, device=device)
        rows = {expression: row for row, expression in enumerate(dict.fromkeys(expressions))}
        tokens = self.tokenizer(list(rows)).to(device)
        embeds = _unit(self.clip.encode_text(tokens, normalize=False))
        return embeds[torch.tensor([rows[expression] for expression in expressions], device=device)]

    @property
    def has_patches(self) -> bool:
        """
        Whether patch embeddings are known for the vision tower, see [`pooled_and_patches`].

        Example:

        ```python
        >>> teacher.has_patches
        True
        ```
        """
        return _embeds_of(self.clip.visual) is not None

    @cached_property
    def fingerprint(self) -> str:
        """
        SHA-256, in hexadecimal, of all that decides the outputs: weights, model configuration, preprocessing and
        tokenizer. Taken when first asked for; a later change, of the dtype for one, is not seen.

        Example:

        ```python
        >>> len(teacher.fingerprint)
        64
        ```
        """
        settings = {
            "outputs_version": _OUTPUTS_VERSION,
            "model_config": self.model_config,
            "tokenizer": _tokenizer_content(self.tokenizer),
            "preprocessing": [self.image_mean, self.image_std, self.image_size, self.interpolation],
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.clip.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _preprocess(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The canvas `(B, 3, S, S)` at the teacher's resolution, normalised with its mean and standard deviation. Unlike
        open_clip's own transform it crops nothing: a crop would cut away what an expression means, and the cells of
        the teacher's grid would not lie over those of the student's.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(f"pixel_values must have the shape (B, 3, S, S), not {tuple(pixel_values.shape)}.")
        # In float32 whatever the weights are: rounding the pixels would cost more than the time it saves.
        pixels = pixel_values.float()
        low, high = (extreme.item() for extreme in pixels.aminmax())
        # Normalised pixels, or bytes, would give plausible and wrong embeddings. The margin is for a caller who
        # undoes a normalisation in bfloat16.
        if not (low >= -0.02 and high <= 1.02):
            raise ValueError(
                f"pixel_values must lie in [0, 1], not yet normalised, and these go from {low:.3g} to {high:.3g}."
            )
        size = (self.image_size, self.image_size)
        if pixels.shape[2:] != size:
            pixels = nn.functional.interpolate(
                pixels, size, mode=self.interpolation, align_corners=False, antialias=True
            )
        pixels = pixels.clamp(0, 1)
        mean, std = pixels.new_tensor([self.image_mean, self.image_std])[..., None, None]
        return ((pixels - mean) / std).to(next(self.clip.visual.parameters()).dtype)


@dataclass
class _Source:
    """
    What a teacher is made of. `weights` is a file, or the tensors themselves. `hf_tokenizer` is the name or folder of
    a Hugging Face tokenizer, or `None` for the one of OpenAI's CLIP, which is part of open_clip.
    """

    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path | dict[str, torch.Tensor]
    hf_tokenizer: str | None
    cache_dir: str | None


def _without_folders(name: str) -> str:
    """A name or path that `from_pretrained` takes, without where on this machine it is: cards show it to anyone."""
    prefix, colon, where = name.rpartition(":")
    if prefix == "hf-hub" or not Path(where).exists():
        return name
    return f"{prefix}{colon}{Path(where).resolve().name}"


def _folder_source(folder: Path, cache_dir: str | None) -> _Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    model_config, preprocess = _read_config(folder / "open_clip_config.json")
    weights = next((folder / name for name in _WEIGHTS_NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"the folder {folder} has no weights, such as {_WEIGHTS_NAMES[0]}.")
    # As in open_clip, whatever the name says: a folder brings its tokenizer with it.
    hf_tokenizer = str(folder) if model_config["text_cfg"].get("hf_tokenizer_name") else None
    return _Source(model_config, preprocess, weights, hf_tokenizer, cache_dir)


def _hub_source(name: str, cache_dir: str | None) -> _Source:
    repository = name.removeprefix("hf-hub:")
    config = _download({"hf_hub": f"{repository}/open_clip_config.json"}, f"the configuration of {name}", cache_dir)
    model_config, preprocess = _read_config(config)
    # Without a file name open_clip looks for the safetensors file first.
    weights = _download({"hf_hub": f"{repository}/"}, f"the weights of {name}", cache_dir)
    hf_tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    return _Source(model_config, preprocess, weights, hf_tokenizer, cache_dir)


def _transformers_source(name: str, cache_dir: str | None) -> _Source:
    from .teacher_conversion import load_transformers_clip

    where = name.removeprefix("transformers:")
    model_config, preprocess, weights = load_transformers_clip(where, cache_dir)
    # The tokenizer's place is not part of the configuration, and so not of the fingerprint.
    return _Source(model_config, preprocess, weights, where, cache_dir)


def _config_file_source(config: Path, pretrained: str | None, cache_dir: str | None) -> _Source:
    model_config, preprocess = _read_config(config)
    if pretrained is None:
        raise ValueError(f"{config} has no weights of its own: pretrained must be the path of a file of weights.")
    hf_tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    return _Source(model_config, preprocess, Path(pretrained), hf_tokenizer, cache_dir)


def _architecture_source(name: str, pretrained: str | None, cache_dir: str | None) -> _Source:
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
    return _Source(model_config, preprocess, weights, hf_tokenizer, cache_dir)


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


def _build(source: _Source, name: str) -> nn.Module:
    """The model with its weights; as in `open_clip.create_model`, which takes no configuration but registered ones."""
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


def _tokenizer(source: _Source, name: str) -> "SimpleTokenizer | HFTokenizer":
    """The model's tokenizer; as in `open_clip.get_tokenizer`, which takes no configuration but registered ones."""
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


def _tokenizer_content(tokenizer: "SimpleTokenizer | HFTokenizer") -> dict[str, Any]:
    """What decides which tokens a text becomes, apart from the options in the model configuration."""
    from open_clip import SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.encoder
    inner = tokenizer.tokenizer
    if not inner.is_fast:
        return inner.get_vocab()
    # Truncation and padding are those of the last call.
    content = json.loads(inner.backend_tokenizer.to_str())
    return {key: value for key, value in content.items() if key not in ("truncation", "padding")}


def in_short(error: Exception) -> str:
    """What an error says, in a line: open_clip's may list every tensor of a model."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings of length 1, to float32's precision even if they come from a lower one."""
    return nn.functional.normalize(embeds.float(), dim=-1)


def pooled_and_patches(visual: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Image embedding `(B, e)` and patch embeddings `(B, grid_height, grid_width, e)`, neither of length 1 yet.

    Args:
        visual (`nn.Module`): the vision tower of an open_clip model.
        pixels (`torch.FloatTensor` of shape `(B, 3, S, S)`): at the tower's resolution, normalised.

    Raises:
        `ValueError`: Patches of this vision tower are not known to lie in the image-text space.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.teacher import pooled_and_patches

    >>> pixels = torch.zeros(1, 3, teacher.image_size, teacher.image_size)
    >>> pooled, patches = pooled_and_patches(teacher.clip.visual, pixels)
    >>> pooled.shape, patches.shape
    (torch.Size([1, 128]), torch.Size([1, 8, 8, 128]))
    ```
    """
    embeds = _embeds_of(visual)
    if embeds is None:
        raise ValueError(
            f"no patch embeddings are known for the vision tower {type(visual).__name__} and its way of pooling: "
            "use output_patches=False."
        )
    return embeds(visual, pixels)


def _embeds_of(visual: nn.Module) -> Callable | None:
    """The function for this vision tower, if there is one."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return _resnet_embeds
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        blocks = visual.transformer.resblocks
        plain_attention = isinstance(blocks[-1].attn, nn.MultiheadAttention)
        if visual.pool_type == "tok" and plain_attention and len(blocks) > 1:
            return _class_token_vit_embeds
        if visual.pool_type == "avg":
            return _average_vit_embeds
    return None


def _resnet_embeds(visual: "ModifiedResNet", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the attention pool would return if it attended to nothing but one position: value and output projection of
    the last feature map, as in MaskCLIP (Zhou et al. 2022; chongzhou96/MaskCLIP: maskclip_head.py) and DenseCLIP (Rao
    et al. 2022). MaskCLIP leaves out the position embedding; here it stays, as the pool's values have it: with one
    head, the pooled embedding is a weighted mean of these and of that of the mean feature.
    """
    features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
    pool = visual.attnpool
    positions = features.flatten(2).mT + pool.positional_embedding[1:].to(features.dtype)
    patches = pool.c_proj(pool.v_proj(positions))
    return pool(features), patches.unflatten(1, features.shape[2:])


def _class_token_vit_embeds(visual: "VisionTransformer", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The last block, reduced to the value and output projection of every token, so that each keeps its place: in their
    last attention, tokens gather what the class token needs, not what they show. The idea is MaskCLIP's (Zhou et al.
    2022). Its published code for ViT keeps the block's residual and MLP (chongzhou96/MaskCLIP: vit.py); both are left
    out here, as in FeatUp (mhamilton723/FeatUp), because they blur maps (ClearCLIP, Lan et al. 2024).
    """
    block = visual.transformer.resblocks[-1]
    attention = block.attn
    before_last = len(visual.transformer.resblocks) - 2
    output = visual.forward_intermediates(pixels, indices=[before_last], output_fmt="NLC")
    # Queries, keys and values are packed in this order.
    value_weight, value_bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    values = nn.functional.linear(block.ln_1(output["image_intermediates"][0]), value_weight, value_bias)
    tokens = visual.ln_post(block.ls_1(attention.out_proj(values)))
    return output["image_features"], (tokens @ visual.proj).unflatten(1, visual.grid_size)


def _average_vit_embeds(visual: "VisionTransformer", pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the tower would return if its average were over one token. Where the normalisation comes before the average
    (`final_ln_after_pool=False`) the pooled embedding is the mean of these.
    """
    last = len(visual.transformer.resblocks) - 1
    output = visual.forward_intermediates(pixels, indices=[last], output_fmt="NLC")
    tokens = visual.ln_post(output["image_intermediates"][0])
    return output["image_features"], (tokens @ visual.proj).unflatten(1, visual.grid_size)
