"""From rows, one per expression, to batches of B images and N expressions."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BatchFeature

from .augmentation import GroundingAugmentation
from .processing_epmvg import EpmVGProcessor


class ImageGroups(Dataset):
    """
    A dataset of expressions seen image by image: its length counts images, and fetching some images gives the rows
    of all their expressions, each image decoded once. A batch of b images so needs b visual passes.

    Args:
        dataset (`datasets.Dataset`):
            One row per expression with `image`, `image_id`, `expression` and, unless boxes are to be predicted only,
            `box`. Rows of one image share its `image_id`.
    """

    def __init__(self, dataset):
        missing = {"image", "image_id", "expression"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"the dataset lacks the column(s) {', '.join(sorted(missing))}; "
                f"it has {', '.join(dataset.column_names)}"
            )
        self.images = dataset.select_columns(["image"])
        self.rows = dataset.select_columns([c for c in ("image_id", "expression", "box") if c in dataset.column_names])
        by_image = defaultdict(list)
        for index, image_id in enumerate(self.rows.select_columns(["image_id"])["image_id"]):
            by_image[image_id].append(index)
        self.groups = list(by_image.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of the images at `indices`, for PyTorch's batch fetching; `row_index` is the row in the dataset."""
        return [row for index in indices for row in self._rows_of(self.groups[index])]

    def _rows_of(self, row_indices: list[int]) -> list[dict[str, Any]]:
        image = self.images[row_indices[0]]["image"]
        columns = self.rows[row_indices]
        values = zip(*columns.values(), strict=True)
        return [
            {"image": image, "row_index": row_index, **dict(zip(columns, row, strict=True))}
            for row_index, row in zip(row_indices, values, strict=True)
        ]


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
    """

    processor: EpmVGProcessor
    augmentation: GroundingAugmentation | None = None
    max_expressions_per_image: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`list[dict]`):
                Rows with `image`, `image_id`, `expression`, and optionally `box` and `row_index`.

        Returns:
            What the processor gives, expressions ordered by image; with `boxes` `(N, 4)`, the true boxes in pixels of
            the image that the processor saw, when the rows have boxes, and `row_index` `(N,)` when they have that.
        """
        groups = self._group(rows)
        images = [group[0]["image"] for group in groups]
        expressions = [[row["expression"] for row in group] for group in groups]
        with_boxes = "box" in rows[0]
        boxes = [np.array([row["box"] for row in group], np.float32) for group in groups] if with_boxes else None
        placements = None
        if self.augmentation is not None:
            if boxes is None:
                raise ValueError("augmentation needs the boxes, and these rows have no column box")
            augmented = map(self.augmentation, images, expressions, boxes)
            images, expressions, boxes = map(list, zip(*augmented, strict=True))
            canvas = self.processor.image_processor.size["height"]
            placements = [self.augmentation.placement(canvas) for _ in images]

        batch = self.processor(
            images=images, text=expressions, boxes=boxes, placements=placements, return_tensors="pt"
        )
        if with_boxes:
            batch["boxes"] = torch.from_numpy(np.concatenate(boxes))
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
