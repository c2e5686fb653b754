"""Labelled images mixed with images that have captions alone, or boxes that no person drew."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from .image_groups import ImageGroup, ImageGroups


class CaptionedGroups(Dataset):
    """
    Labelled images, and `ratio` captioned images for each of them, as one dataset of [`ImageGroup`]s. An epoch shows
    every labelled image once. The captioned images take turns in an order of their own, and each epoch goes on where
    the one before stopped.

    Args:
        labelled ([`ImageGroups`]): images with boxes.
        captioned ([`ImageGroups`]): images with expressions or sentences, and boxes of those that have one.
        ratio (`float`): how many captioned images there are for each labelled image.
        seed (`int`): decides the order of the captioned images.

    Raises:
        ValueError: there is no captioned image.

    Example:

    ```python
    >>> from epmvg_hf import ImageGroups
    >>> from epmvg_hf.data.captioned_groups import CaptionedGroups

    >>> captions = dataset.remove_columns("box")
    >>> groups = CaptionedGroups(ImageGroups(dataset), ImageGroups(captions), ratio=0.5, seed=0)
    >>> len(groups), groups[5].boxes[0]  # 4 labelled and 2 captioned images
    (6, array([nan, nan, nan, nan], dtype=float32))
    ```
    """

    def __init__(self, labelled: ImageGroups, captioned: ImageGroups, ratio: float, seed: int):
        if len(captioned) == 0:
            raise ValueError("the caption dataset has no rows")
        self.labelled, self.captioned = labelled, captioned
        self.num_captioned = max(1, round(ratio * len(labelled)))
        self.order = np.random.default_rng(seed).permutation(len(captioned)).tolist()
        # The workers of a data loader may live longer than an epoch, so they must see the number change.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """
        Sets the epoch, which decides which captioned images are shown. [`EpmVGTrainer`] calls this itself, because
        accelerate passes the epoch on to the dataset on one process only.
        """
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labelled) + self.num_captioned

    def __getitem__(self, index: int) -> ImageGroup:
        """The image at `index`; its own `index` counts the labelled images first, then all captioned ones."""
        if index < len(self.labelled):
            return self.labelled[index]
        turn = self.epoch.item() * self.num_captioned + index - len(self.labelled)
        captioned_index = self.order[turn % len(self.order)]
        group = self.captioned[captioned_index]
        boxes = np.full((len(group), 4), np.nan, np.float32) if group.boxes is None else group.boxes
        number = None if group.index is None else len(self.labelled) + captioned_index
        return replace(group, boxes=boxes, index=number)

    def __getitems__(self, indices: Sequence[int]) -> list[ImageGroup]:
        """
        The images of a batch, for PyTorch's data loader: the labelled ones first, otherwise in the order of `indices`.
        Augmentation and dropout draw in this order, so the numbers of a run with a seed depend on it.
        """
        return [self[index] for index in sorted(indices, key=lambda index: index >= len(self.labelled))]
