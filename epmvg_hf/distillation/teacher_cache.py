"""The teacher's embeddings, computed once and read back in every training step."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch

from ..data.image_groups import ImageGroups, is_transformed
from ..data.pictures import fingerprint_files
from .fingerprints import settings_of
from .output_cache import (
    CachedExpressions,
    CachedImages,
    Columns,
    autocast_dtype,
    complete,
    make_folder,
    process_images,
    split,
    to_tensor,
)

if TYPE_CHECKING:
    from ..model.image_processing_epmvg import EpmVGImageProcessor
    from .clip_teacher import ClipTeacher

# Part of every key. Raise it when a change of the code changes the files, or the pixels that the teacher sees.
_FORMAT_VERSION = 3

# A shard is the unit in which processes share the work, and all that is lost when one of them is killed.
_IMAGES_PER_SHARD = 256
_EXPRESSIONS_PER_SHARD = 4096


class TeacherCache:
    """
    Embeddings of images, their patches, and expressions, for training without augmentation. They stay on disk in
    float16 and are memory-mapped: an image with h x w patches of e dimensions takes 2 * e * (h * w + 1) bytes. A cache
    can be sent to other processes, such as the workers of a data loader. Made with [`~TeacherCache.build`].

    Args:
        image_shards (`Sequence[Path]`): Arrow files with `image_embeds` and, optionally, `patch_embeds`.
        expression_shards (`Sequence[Path]`): Arrow files with `expression` and `text_embeds`.

    Raises:
        ValueError: the embeddings in two files differ in shape, or only some files have patches.

    Example:

    ```python
    >>> from epmvg_hf.distillation.teacher_cache import TeacherCache

    >>> cache = TeacherCache.build(teacher, dataset, processor.image_processor, cache_dir="outputs/teacher")
    >>> embeds = cache.lookup(groups=[0, 1], expressions=["red star"])  # of two images and one expression
    >>> embeds["teacher_patch_embeds"].shape, embeds["teacher_text_embeds"].shape
    (torch.Size([2, 8, 8, 128]), torch.Size([1, 128]))
    ```
    """

    def __init__(self, image_shards: Sequence[Path], expression_shards: Sequence[Path]):
        self.image_shards, self.expression_shards = list(image_shards), list(expression_shards)
        self._images = CachedImages(self.image_shards, "teacher cache")
        self._expressions = CachedExpressions(self.expression_shards, "teacher cache")

    @classmethod
    def build(
        cls,
        teacher: "ClipTeacher",
        dataset: datasets.Dataset,
        image_processor: "EpmVGImageProcessor",
        cache_dir: str | os.PathLike | None = None,
        output_patches: bool = True,
        batch_size: int = 64,
        disable_tqdm: bool = False,
    ) -> "TeacherCache":
        """
        Computes the embeddings that are not on disk yet. After an interruption it goes on where it stopped. Processes
        that build the same cache at the same time share the work, and each returns when everything is there. The
        teacher computes under the caller's autocast.

        What identifies a cache is the teacher's fingerprint, the dtype that it computes in, the settings of the image
        processor, the fingerprint of the dataset, and sizes and times of change of the image files that it names. A
        dataset whose fingerprint is random therefore gets a new cache every time.

        Args:
            teacher ([`ClipTeacher`]): runs on the device of its parameters.
            dataset (`datasets.Dataset`):
                Rows with `image`, `image_id` and `expression`. Image i of the cache is image i of
                [`~image_groups.ImageGroups`] of this dataset.
            image_processor ([`EpmVGImageProcessor`]): makes the canvases that the teacher sees, without augmentation.
            cache_dir (`str` or `os.PathLike`, *optional*):
                The folder in which each cache gets a folder. Defaults to a folder in the cache of `datasets`.
            output_patches (`bool`, *optional*, defaults to `True`): whether to keep patch embeddings.
            batch_size (`int`, *optional*, defaults to 64): how many images or expressions the teacher sees at a time.
            disable_tqdm (`bool`, *optional*, defaults to `False`): whether to hide the progress bars.

        Raises:
            ValueError: the dataset has no rows or a transform, or a row has no image.
        """
        if len(dataset) == 0:
            raise ValueError("the teacher cannot be cached for a dataset without rows")
        if is_transformed(dataset):
            raise ValueError(
                "the teacher cannot be cached for a dataset whose transform may make other images each time"
            )
        groups = ImageGroups(dataset)
        expressions = list(dict.fromkeys(groups.rows.select_columns(["expression"])[:]["expression"]))
        device = next(teacher.parameters()).device
        key = {
            "format_version": _FORMAT_VERSION,
            "teacher": teacher.fingerprint,
            "embed_dim": teacher.embed_dim,
            "autocast": autocast_dtype(device),
            "output_patches": output_patches,
            "image_processor": settings_of(image_processor),
            "dataset": dataset._fingerprint,
            "files": fingerprint_files(groups.images),
            "images": len(groups),
            "expressions": len(expressions),
            "images_per_shard": _IMAGES_PER_SHARD,
            "expressions_per_shard": _EXPRESSIONS_PER_SHARD,
        }
        folder = make_folder(cache_dir, "epmvg_teacher", key)
        image_columns = ("image_embeds", "patch_embeds") if output_patches else ("image_embeds",)
        text_columns = ("expression", "text_embeds")

        def encode_images(start: int, stop: int) -> Columns:
            images = process_images(groups, start, stop, image_processor, "the teacher")
            canvases = image_processor.unnormalize(images["pixel_values"].to(device))
            image_embeds, patch_embeds = teacher.encode_images(canvases, output_patches=output_patches)
            columns: Columns = {"image_embeds": _to_half(image_embeds)}
            return columns if patch_embeds is None else {**columns, "patch_embeds": _to_half(patch_embeds)}

        def encode_expressions(start: int, stop: int) -> Columns:
            batch = expressions[start:stop]
            return {"expression": np.array(batch, object), "text_embeds": _to_half(teacher.encode_texts(batch))}

        image_shards = split(folder, "images", len(groups), _IMAGES_PER_SHARD, image_columns)
        expression_shards = split(folder, "expressions", len(expressions), _EXPRESSIONS_PER_SHARD, text_columns)
        return cls(
            complete(image_shards, encode_images, batch_size, "Teacher: images", disable_tqdm),
            complete(expression_shards, encode_expressions, batch_size, "Teacher: expressions", disable_tqdm),
        )

    @classmethod
    def concatenate(cls, caches: Sequence["TeacherCache"]) -> "TeacherCache":
        """
        One cache for several datasets: the images of the first, then those of the second, and so on, and the
        expressions of all. All caches must be of the same teacher.

        Raises:
            ValueError: the embeddings differ in shape, or only some of the caches have patches.
        """
        if len(caches) == 1:
            return caches[0]
        return cls(
            [path for cache in caches for path in cache.image_shards],
            [path for cache in caches for path in cache.expression_shards],
        )

    def lookup(self, groups: Sequence[int], expressions: Sequence[str]) -> dict[str, torch.Tensor]:
        """
        Reads the embeddings of a batch.

        Args:
            groups (`Sequence[int]`): numbers of B images, see [`~TeacherCache.build`].
            expressions (`Sequence[str]`): N expressions.

        Returns:
            `dict` of float32 tensors, in the order of the arguments; unit vectors up to the rounding to float16:
            - **teacher_image_embeds** `(B, e)`,
            - **teacher_text_embeds** `(N, e)`,
            - **teacher_patch_embeds** `(B, h, w, e)`, if built with patches.

        Raises:
            IndexError: the cache has no image with such a number.
            ValueError: the cache does not have an expression.
        """
        images, texts = self._images.lookup(groups), self._expressions.lookup(expressions)
        embeds = {f"teacher_{name}": to_tensor(images[name]).float() for name in images.column_names}
        return {**embeds, "teacher_text_embeds": to_tensor(texts["text_embeds"]).float()}


def _to_half(embeds: torch.Tensor) -> np.ndarray:
    return embeds.to("cpu", torch.float16).numpy()
