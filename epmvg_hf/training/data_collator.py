"""From rows, one per expression, to batches of B images and N expressions."""

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchFeature

from ..distillation.teacher_cache import TeacherCache
from ..model.processing_epmvg import NO_BOX, EpmVGProcessor
from .augmentation import GroundingAugmentation

if TYPE_CHECKING:
    pass

# What a batch holds besides the inputs of the model and what the teacher gave.
OTHER_COLUMNS = ("boxes", "row_index", "expressions")


@dataclass
class EpmVGDataCollator:
    """
    Groups the rows of each image into one visual pass: rows in, one batch of B images and N expressions out.

    Args:
        processor (`EpmVGProcessor`):
            Makes tensors and labels.
        augmentation (`GroundingAugmentation`, *optional*):
            For training; one draw per image, shared by its expressions.
        max_expressions_per_image (`int`, *optional*):
            Keep a random choice of this many expressions of each image, for training on images with very many.
        keep_expressions (`bool`, *optional*, defaults to `False`):
            Whether the batch also has the texts, which a teacher reads with a tokenizer of its own.
        teacher_cache ([`TeacherCache`], *optional*):
            Adds the teacher's outputs to the batch; its rows are the images of the [`ImageGroups`] that are batched.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from epmvg_hf import EpmVGDataCollator, ImageGroups

    >>> loader = DataLoader(ImageGroups(dataset), batch_size=2, collate_fn=EpmVGDataCollator(processor))
    >>> batch = next(iter(loader))
    >>> batch["pixel_values"].shape, batch["labels"].shape  # 2 images, 16 expressions
    (torch.Size([2, 3, 64, 64]), torch.Size([16, 4]))
    ```
    """

    processor: EpmVGProcessor
    augmentation: GroundingAugmentation | None = None
    max_expressions_per_image: int | None = None
    keep_expressions: bool = False
    teacher_cache: TeacherCache | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`list[dict]`):
                Rows with `image`, `image_id`, `expression`, and optionally `box`, `row_index` and `group`.

        Returns:
            What the processor gives, expressions ordered by image; with `boxes` `(N, 4)`, the true boxes in pixels of
            the image that the processor saw, when the rows have boxes, and `row_index` `(N,)` when they have that.
            A box that is `None` becomes NaN, in `boxes` and in `labels`. With `keep_expressions`, `expressions`
            (`list[str]`); with a cache, the outputs of [`TeacherCache.lookup`].

        Raises:
            ValueError: a row has no image, an augmentation finds no boxes, or the processor refuses a text or a box.
        """
        groups = self._group(rows)
        images = [group[0]["image"] for group in groups]
        expressions = [[row["expression"] for row in group] for group in groups]
        boxes = [[row["box"] for row in group] for group in groups] if "box" in rows[0] else None
        placements = None
        if self.augmentation is not None:
            if boxes is None:
                raise ValueError("augmentation needs the boxes, and these rows have no column box")
            has_box = [[box is not None for box in group] for group in boxes]
            arrays = [np.array([NO_BOX if box is None else box for box in group], np.float32) for group in boxes]
            images, expressions, arrays = zip(*map(self.augmentation, images, expressions, arrays), strict=True)
            images, expressions = list(images), list(expressions)
            boxes = [
                [box if known else None for box, known in zip(*group, strict=True)]
                for group in zip(arrays, has_box, strict=True)
            ]
            canvas = self.processor.image_processor.size["height"]
            placements = [self.augmentation.placement(canvas) for _ in images]

        batch = self.processor(
            images=images, text=expressions, boxes=boxes, placements=placements, return_tensors="pt"
        )
        if boxes is not None:
            flat = [NO_BOX if box is None else box for group in boxes for box in group]
            batch["boxes"] = torch.from_numpy(np.array(flat, np.float32))
        if self.keep_expressions:
            batch["expressions"] = [expression for group in expressions for expression in group]
        if self.teacher_cache is not None:
            texts = [row["expression"] for group in groups for row in group]
            batch.update(self.teacher_cache.lookup([group[0]["group"] for group in groups], texts))
        if "row_index" in rows[0]:
            batch["row_index"] = torch.tensor([row["row_index"] for group in groups for row in group])
        return batch

    def _group(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        groups = defaultdict(list)
        for row in rows:
            if row["image"] is None:
                raise ValueError(
                    f"image {row['image_id']!r} is not there (missing_images='keep' serves work on annotations only)"
                )
            groups[row["image_id"]].append(row)
        if self.max_expressions_per_image is None:
            return list(groups.values())
        limit = self.max_expressions_per_image
        return [random.sample(group, limit) if len(group) > limit else group for group in groups.values()]
