"""A frozen CLIP, whose image-text space the student is taught; needed in training only."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..utils import needs_extra
from .patch_embeddings import embeds_of, pooled_and_patches
from .teacher_sources import build_clip, find_source, load_tokenizer, without_folders

if TYPE_CHECKING:
    from open_clip import CLIP, CoCa, CustomTextCLIP, HFTokenizer, SimpleTokenizer

# Part of every fingerprint: to be raised when the same weights and pixels are to give other embeddings.
_OUTPUTS_VERSION = 1


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

        source = find_source(name, pretrained, cache_dir)
        shown = " ".join(without_folders(part) for part in (name, pretrained) if part is not None)
        return cls(build_clip(source, name), load_tokenizer(source, name), source.model_config, shown)

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
        Whether patch embeddings are known for the vision tower, see [`~patch_embeddings.pooled_and_patches`].

        Example:

        ```python
        >>> teacher.has_patches
        True
        ```
        """
        return embeds_of(self.clip.visual) is not None

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


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings of length 1, to float32's precision even if they come from a lower one."""
    return nn.functional.normalize(embeds.float(), dim=-1)
