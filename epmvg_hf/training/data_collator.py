"""Makes batches of B images and N expressions from images with their expressions."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from ..data.image_groups import ImageGroup, merge_groups
from ..data.streamed_rows import group_rows
from ..model.losses import is_absent
from ..model.nested_inputs import flatten
from ..model.processing_epmvg import EpmVGProcessor
from .augmentation import GroundingAugmentation
from .row_draws import RowDraws


@dataclass
class EpmVGDataCollator:
    """
    Makes one batch of B images and N expressions, in which each image stands once, however many expressions it has.

    Args:
        processor (`EpmVGProcessor`):
            Makes tensors and labels.
        augmentation (`GroundingAugmentation`, *optional*):
            Changes training images; all expressions of an image share one draw.
        max_expressions_per_image (`int`, *optional*):
            Limit for images with very many expressions: of each image, this many are chosen at random.
        teacher_columns (`Callable`, *optional*):
            Makes the columns that a teacher needs from the indices of the batch's images and the list of its
            expressions, see [`~teaching.Teaching.columns`].
        tower_outputs (`Callable`, *optional*):
            Makes what frozen towers gave for these images and expressions, see [`~frozen_towers.TowerOutputs`]. Then
            the processor is not asked for the inputs of these towers.
        as_bytes (`bool`, *optional*, defaults to `False`):
            Whether `pixel_values` stay bytes until [`~EpmVGImageProcessor.from_bytes`] normalises them. The workers
            of a data loader then send 5 times less.
        draws (`RowDraws`, *optional*):
            Gives each image whose rows are numbered random states of its own, see [`~row_draws.RowDraws`]. Without it,
            and for rows without numbers, augmentation and the choice of expressions draw from the global ones.

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
    teacher_columns: Callable[..., dict[str, Any]] | None = None
    tower_outputs: Callable[..., dict[str, torch.Tensor]] | None = None
    as_bytes: bool = False
    draws: RowDraws | None = None

    def __call__(self, examples: list[ImageGroup] | list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            examples (`list[ImageGroup]` or `list[dict]`):
                Items of [`ImageGroups`], of which those of the same image are merged, or rows of a stream with
                `image`, `expression` and optionally `image_id`, `box` and `row_index`, which are grouped if they agree
                in `image_id` and pixels.

        Returns:
            The processor's inputs, with the images in the order of their first appearance and the expressions ordered
            by image. Datasets with boxes add `boxes` `(N, 4)`, float32 xyxy pixels of the image that the processor
            saw; where an expression has no box, its rows of `boxes` and `labels` are NaN, and where it names nothing
            in its image, they are zeros. Numbered rows add
            `row_index` `(N,)`, and a teacher adds its columns.

        Raises:
            ValueError: a row cannot be used, an image is missing, augmentation lacks the boxes or a PIL image, or the
                processor refuses a text.
        """
        groups = merge_groups(examples) if isinstance(examples[0], ImageGroup) else group_rows(examples)
        drawn = [self._draw(group) for group in groups]
        groups = [group for group, _ in drawn]
        placements = None if self.augmentation is None else [placement for _, placement in drawn]
        numbers = [group.index for group in groups]
        known: dict[str, torch.Tensor] = {}
        if self.tower_outputs is not None:
            known = self.tower_outputs(numbers, flatten([group.expressions for group in groups]))
        for group in groups:
            if group.image is None and "backbone_features" not in known:
                raise ValueError(
                    f"image {group.image_id!r} is missing: rows loaded with missing_images='keep' cannot be batched"
                )
        has_boxes = groups[0].boxes is not None
        text = [group.expressions for group in groups]
        boxes = [_without_absent(group.boxes) for group in groups if group.boxes is not None] if has_boxes else None
        if "backbone_features" in known:
            batch = BatchFeature(known)
            if "text_hidden_states" not in known:
                batch.update(self.processor(text=flatten(text), return_tensors="pt"))
            batch["image_index"] = torch.tensor([image for image, group in enumerate(text) for _ in group])
            if boxes is not None:
                batch["labels"] = self.processor.make_labels(batch, boxes, text)
        else:
            batch = self.processor(
                images=[group.image for group in groups],
                text=text,
                boxes=boxes,
                placements=placements,
                as_bytes=self.as_bytes,
                return_tensors="pt",
            )
            if "text_hidden_states" in known:
                del batch["input_ids"]
                batch.update(known)
        if has_boxes:
            batch["boxes"] = torch.cat([torch.from_numpy(group.boxes) for group in groups])
            batch["labels"][is_absent(batch["boxes"])] = 0
        if groups[0].row_indices:
            batch["row_index"] = torch.tensor([index for group in groups for index in group.row_indices])
        if self.teacher_columns is not None:
            batch.update(self.teacher_columns(numbers, flatten([group.expressions for group in groups])))
        return batch

    def _draw(self, group: ImageGroup) -> tuple[ImageGroup, tuple[int, float, float] | None]:
        """A group with what is left to chance: which expressions there are, its augmentation, its placement."""
        with nullcontext() if self.draws is None or not group.row_indices else self.draws.of(group.row_indices[0]):
            group = self._choose_expressions(group)
            if self.augmentation is None or group.image is None:
                return group, None
            canvas = self.processor.image_processor.size["height"]
            return self._augment(group, self.augmentation), self.augmentation.placement(canvas)

    def _choose_expressions(self, group: ImageGroup) -> ImageGroup:
        limit = self.max_expressions_per_image
        if limit is None or len(group) <= limit:
            return group
        return group.select(random.sample(range(len(group)), limit))

    @staticmethod
    def _augment(group: ImageGroup, augmentation: GroundingAugmentation) -> ImageGroup:
        if group.boxes is None:
            raise ValueError("augmentation needs the boxes, and these rows have no column box")
        if not isinstance(group.image, Image.Image):
            raise ValueError(
                f"augmentation needs PIL images, and image {group.image_id!r} is a {type(group.image).__name__}, as "
                "the dataset's transform gives it: set augment to False, or let the transform return PIL images"
            )
        image, expressions, boxes = augmentation(group.image, group.expressions, group.boxes)
        return replace(group, image=image, expressions=expressions, boxes=boxes.astype(np.float32, copy=False))


def _without_absent(boxes: np.ndarray) -> np.ndarray:
    """Boxes `(n, 4)` with NaN in place of zeros, which the processor would take for a broken box."""
    absent = is_absent(torch.from_numpy(boxes)).numpy()
    return np.where(absent[:, None], np.float32(np.nan), boxes)
