"""The teacher, a frozen CLIP, whose shared space of images and texts is taught to the student in training."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..utils import needs_extra
from .fingerprints import content_of, fingerprint_of
from .patch_embeddings import patch_embedder, pooled_and_patches

if TYPE_CHECKING:
    from open_clip import CLIP, CoCa, CustomTextCLIP, HFTokenizer, SimpleTokenizer

# Part of every fingerprint, and so of every cache. Raise it when a change of the code changes the embeddings that the
# same weights give for the same pixels and texts.
_OUTPUTS_VERSION = 1


@dataclass
class TeacherOutput(ModelOutput):
    """
    Outputs of [`ClipTeacher`] for B images and N expressions: unit vectors in one space of `e` dimensions.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, e)`):
            One embedding per image.
        text_embeds (`torch.FloatTensor` of shape `(N, e)`):
            One embedding per expression.
        patch_embeds (`torch.FloatTensor` of shape `(B, grid_height, grid_width, e)`, *optional*):
            One embedding per cell of the teacher's grid, which covers the whole canvas, padding included. Returned
            with `output_patches=True`.

    Example:

    ```python
    >>> import torch

    >>> output = teacher(torch.zeros(1, 3, 64, 64), ["the red star", "a circle"])
    >>> output.image_embeds.shape, output.text_embeds.shape, output.patch_embeds.shape
    (torch.Size([1, 128]), torch.Size([2, 128]), torch.Size([1, 8, 8, 128]))
    ```
    """

    image_embeds: torch.Tensor
    # Always given, but ModelOutput allows only one field without a default.
    text_embeds: torch.Tensor = None  # type: ignore[assignment]
    patch_embeds: torch.Tensor | None = None


class ClipTeacher(nn.Module):
    """
    A frozen open_clip model that embeds images, their patches, and expressions in one space. Its resolution, mean,
    standard deviation and tokenizer need not be those of the student: it takes pixels in [0, 1] and strings, and
    prepares both itself. It never trains: `train()` has no effect, and no output has a gradient. It computes in the
    dtype of its weights, or under the caller's autocast, and returns float32.

    Usually made with [`~ClipTeacher.from_pretrained`].

    Args:
        clip (`open_clip.CLIP`, `open_clip.CustomTextCLIP` or `open_clip.CoCa`):
            The model with its weights and preprocessing, as `open_clip.create_model` returns it.
        tokenizer (`open_clip.SimpleTokenizer` or `open_clip.HFTokenizer`):
            The model's tokenizer, as `open_clip.get_tokenizer` returns it.
        model_config (`dict`):
            The model's open_clip configuration.
        name (`str`, *optional*):
            The name that model cards give it.

    Attributes:
        name (`str` or `None`): what it was loaded from, such as `"ViT-B-32 openai"`, without the folders of a path.
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
            raise ValueError(f"a teacher must take square images, like the student's canvas, not {height} x {width}.")

        self.clip = clip
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.name = name
        self.embed_dim = model_config["embed_dim"]
        self.image_size = height
        self.image_mean = tuple(map(float, preprocess["mean"]))
        self.image_std = tuple(map(float, preprocess["std"]))
        # open_clip resizes bicubically unless the setting is "bilinear", even if it is "random".
        self.interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
        # On a CPU in bfloat16 this makes a ResNet several times as fast; to a ViT it makes no difference.
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(cls, name: str, pretrained: str | None = None, cache_dir: str | None = None) -> "ClipTeacher":
        """
        Loads a teacher with all of its weights, or raises an error: no weight is ever left random. Nothing in a file
        is executed: weights are `.safetensors` files, or `.pt`, `.pth` or `.bin` files that hold only tensors.

        Args:
            name (`str`):
                One of:
                - an architecture that open_clip knows, such as `"ViT-B-32"`;
                - the path of a `.json` file with an open_clip model configuration: either `embed_dim`, `vision_cfg`
                  and `text_cfg`, or a `model_cfg` with these and a `preprocess_cfg`;
                - `"local-dir:/a/folder"`, a folder with such an `open_clip_config.json`, the weights, if the
                  configuration names a Hugging Face tokenizer, a tokenizer, and if it names a Hugging Face text tower,
                  the `config.json` of that tower, without which the Hub is asked for it;
                - `"hf-hub:organization/repository"`, a Hub repository with these files;
                - `"transformers:/a/folder"` or `"transformers:organization/repository"`, a folder or Hub repository
                  with a `CLIPModel` of transformers, its tokenizer and its image processor, such as
                  `"transformers:openai/clip-vit-base-patch32"`. The model is converted to the `open_clip.CLIP` that
                  gives the same embeddings.
            pretrained (`str`, *optional*):
                The weights of an architecture, either one of open_clip's tags, such as `"openai"`, or the path of a
                file; for a `.json` file the path of a file. Folders and repositories have weights of their own. A tag
                also decides between GELU and QuickGELU; with a file, the name of the architecture decides
                (`"ViT-B-32-quickgelu"`). open_clip resamples position embeddings of another resolution.
            cache_dir (`str`, *optional*):
                Where downloads are kept. Defaults to the cache of `huggingface_hub`.

        Raises:
            `ImportError`: open_clip is not installed.
            `FileNotFoundError`: A file or folder is missing.
            `OSError`: A download failed, or `"transformers:"` names neither a folder nor a Hub repository.
            `ValueError`: The name or tag is unknown, `pretrained` is missing or not allowed, a file is malformed or
                holds code, the tensors are not exactly those of the model, the tokenizer does not fit it, or open_clip
                has no equivalent of the `CLIPModel`.

        Example:

        ```python
        >>> from epmvg_hf import ClipTeacher

        >>> teacher = ClipTeacher.from_pretrained("local-dir:model_cards/clip-tiny-shapes")  # or "ViT-B-32", "openai"
        >>> teacher.encode_texts(["the red circle", "the star on the left"]).shape
        torch.Size([2, 128])
        ```
        """
        with needs_extra("ClipTeacher", "teacher"):
            from .teacher_sources import load_clip, name_for_cards

        clip, tokenizer, model_config = load_clip(name, pretrained, cache_dir)
        shown = " ".join(name_for_cards(part) for part in (name, pretrained) if part is not None)
        return cls(clip, tokenizer, model_config, shown)

    def train(self, mode: bool = True) -> "ClipTeacher":
        """
        Stays in evaluation mode, also when a module that contains the teacher is set to training.

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
                N expressions in any order: the teacher does not need to know which image each of them is about.
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
        return TeacherOutput(image_embeds, self.encode_texts(expressions), patch_embeds)

    @torch.no_grad()
    def encode_images(
        self, pixel_values: torch.Tensor, output_patches: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, S, S)`):
                RGB in [0, 1]: the student's canvas, with its padding and augmentation, *before* the student's
                normalisation. S need not be `image_size`.
            output_patches (`bool`, *optional*, defaults to `True`):
                Whether to return patch embeddings, which only some vision towers have (see `has_patches`).

        Returns:
            `tuple`: `image_embeds` `(B, e)`, the normalised embeddings of open_clip's `encode_image`, and
            `patch_embeds` `(B, grid_height, grid_width, e)` or `None`.

        Raises:
            `ValueError`: The pixels have another shape or range, or the vision tower has no patch embeddings.

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
            expressions (`list[str]`): N expressions; N may be 0. Equal expressions are computed once.

        Returns:
            `torch.FloatTensor` of shape `(N, e)`: unit vectors.

        Raises:
            `ValueError`: `expressions` is a string, not a list.

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
        Whether this vision tower has patch embeddings, see [`~patch_embeddings.pooled_and_patches`].

        Example:

        ```python
        >>> teacher.has_patches
        True
        ```
        """
        return patch_embedder(self.clip.visual) is not None

    @cached_property
    def fingerprint(self) -> str:
        """
        SHA-256, in hexadecimal, of everything that decides the outputs: weights, model configuration, preprocessing
        and tokenizer. It is computed once, so a later change, for example of the dtype, does not change it.

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
        return fingerprint_of(self.clip, settings)

    def _preprocess(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The canvas `(B, 3, S, S)` at the teacher's resolution, normalised with its mean and standard deviation.
        open_clip's own transform would crop it: that could remove what an expression refers to, and the cells of the
        teacher's grid would no longer cover those of the student's.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(f"pixel_values must have the shape (B, 3, S, S), not {tuple(pixel_values.shape)}.")
        # In float32 whatever the dtype of the weights: rounded pixels cost more accuracy than the time is worth.
        pixels = pixel_values.float()
        low, high = (extreme.item() for extreme in pixels.aminmax())
        # Normalised pixels or bytes would give plausible, wrong embeddings. The margin is for callers who undo the
        # student's normalisation in bfloat16.
        if not (low >= -0.02 and high <= 1.02):
            raise ValueError(
                f"pixel_values must be in [0, 1], not yet normalised, but these go from {low:.3g} to {high:.3g}."
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
    """The content of a tokenizer that, with the model configuration, decides which tokens a text becomes."""
    from open_clip import SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.encoder
    return content_of(tokenizer.tokenizer)


def _unit(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings scaled to length 1, in float32 so that bfloat16 embeddings also have it exactly."""
    return nn.functional.normalize(embeds.float(), dim=-1)
