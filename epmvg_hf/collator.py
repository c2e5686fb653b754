"""From rows, one per expression, to batches of B images and N expressions."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BatchFeature

from .augmentation import GroundingAugmentation
from .processing_epmvg import NO_BOX, EpmVGProcessor
from .teacher_cache import TeacherCache

if TYPE_CHECKING:
    import datasets

# What a batch holds besides the inputs of the model and what the teacher gave.
OTHER_COLUMNS = ("boxes", "row_index", "expressions")


class ImageGroups(Dataset):
    """
    A dataset of expressions seen image by image: its length counts images, and fetching some images gives the rows
    of all their expressions, each image decoded once. A batch of b images so needs b visual passes. A `box` that is
    `None` means that the expression has none: it takes part in distillation only.

    Args:
        dataset (`datasets.Dataset`):
            One row per expression with `image`, `image_id`, `expression` and, unless boxes are to be predicted only,
            `box`. Rows of one image share its `image_id`.

    Raises:
        ValueError: the dataset lacks a column.

    Example:

    ```python
    >>> from epmvg_hf import ImageGroups

    >>> groups = ImageGroups(dataset)
    >>> len(dataset), len(groups)
    (32, 4)
    >>> [row["expression"] for row in groups.__getitems__([3])][:2]
    ['red star', 'the lowest red circle']
    ```
    """

    def __init__(self, dataset: "datasets.Dataset"):
        missing = {"image", "image_id", "expression"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"the dataset lacks the column(s) {', '.join(sorted(missing))}; "
                f"it has {', '.join(dataset.column_names)}"
            )
        self.images = dataset.select_columns(["image"])
        self.rows = dataset.select_columns([c for c in ("image_id", "expression", "box") if c in dataset.column_names])
        by_image = defaultdict(list)
        for index, image_id in enumerate(self.rows.select_columns(["image_id"])[:]["image_id"]):
            by_image[image_id].append(index)
        self.groups = list(by_image.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """
        The rows of the images at `indices`, for PyTorch's batch fetching; `row_index` is the row in the dataset,
        `group` the index of its image.
        """
        return [row for index in indices for row in self._rows_of(index)]

    def _rows_of(self, group: int) -> list[dict[str, Any]]:
        row_indices = self.groups[group]
        image = self.images[row_indices[0]]["image"]
        columns = self.rows[row_indices]
        values = zip(*columns.values(), strict=True)
        return [
            {"image": image, "row_index": row_index, "group": group, **dict(zip(columns, row, strict=True))}
            for row_index, row in zip(row_indices, values, strict=True)
        ]


class CaptionedGroups(Dataset):
    """
    Labelled images, and `ratio` captioned images for each of them, as one dataset of [`ImageGroups`]. An epoch shows
    every labelled image once; the captioned ones take turns, in an order of their own, and go on where the epoch
    before stopped. Rows of captioned images have the box `None`.

    Args:
        labelled (`ImageGroups`): images with boxes.
        captioned (`ImageGroups`): images with expressions or sentences; boxes, if there are any, are not read.
        ratio (`float`): captioned images for each labelled image.
        seed (`int`): sets the order of the captioned images.

    Raises:
        ValueError: there is no captioned image.

    Example:

    ```python
    >>> from epmvg_hf.collator import CaptionedGroups, ImageGroups

    >>> captions = dataset.remove_columns("box")
    >>> groups = CaptionedGroups(ImageGroups(dataset), ImageGroups(captions), ratio=0.5, seed=0)
    >>> len(groups), groups.__getitems__([5])[0]["box"]  # 4 labelled and 2 captioned images
    (6, None)
    ```
    """

    def __init__(self, labelled: ImageGroups, captioned: ImageGroups, ratio: float, seed: int):
        if len(captioned) == 0:
            raise ValueError("the caption dataset has no rows")
        self.labelled, self.captioned = labelled, captioned
        self.num_captioned = max(1, round(ratio * len(labelled)))
        self.order = np.random.default_rng(seed).permutation(len(captioned)).tolist()
        # In shared memory, for workers of a data loader that live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch decides whose turn it is. [`EpmVGTrainer`] calls this; accelerate does so on one process only."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labelled) + self.num_captioned

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of the images at `indices`; `group` counts labelled images first, then captioned ones."""
        first_captioned = len(self.labelled)
        rows = self.labelled.__getitems__([index for index in indices if index < first_captioned])
        turns = [self.epoch.item() * self.num_captioned + index - first_captioned for index in indices]
        groups = [
            self.order[turn % len(self.order)] for turn, i in zip(turns, indices, strict=True) if i >= first_captioned
        ]
        for row in self.captioned.__getitems__(groups):
            # The two sets may give the same id to different images.
            changes = {
                "image_id": ("captioned", row["image_id"]),
                "group": first_captioned + row["group"],
                "box": None,
            }
            rows.append({**row, **changes})
        return rows


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
