"""Rows of expressions seen image by image."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    import datasets


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
    >>> from epmvg_hf.data.image_groups import CaptionedGroups, ImageGroups

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
