"""Rows of expressions grouped by the image that they are about, so that each image needs one visual pass."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from .files.image_files import decode_jpeg

if TYPE_CHECKING:
    import datasets


@dataclass
class ImageGroup:
    """
    An image and n expressions about it.

    Args:
        image (`PIL.Image.Image` or `None`): the decoded image; `None` if the dataset keeps rows without image files.
        image_id (`str`): the id of the image in the dataset.
        expressions (`list[str]`): the expressions.
        boxes (`np.ndarray` of shape `(n, 4)` or `None`):
            float32 boxes, xyxy in pixels of the image, 0-based and half-open. A row of NaN means that the expression
            has no box. `None` if the dataset has no column of boxes.
        row_indices (`list[int]`): the dataset's row of each expression; empty if the rows are not numbered.
        index (`int` or `None`): the number of this image among the images of the dataset, if those are known.
    """

    image: Image.Image | None
    image_id: Any
    expressions: list[str]
    boxes: np.ndarray | None
    row_indices: list[int]
    index: int | None = None

    def __len__(self) -> int:
        return len(self.expressions)

    def select(self, positions: Sequence[int]) -> "ImageGroup":
        """The same image with the expressions at these positions only."""
        return replace(
            self,
            expressions=[self.expressions[position] for position in positions],
            boxes=None if self.boxes is None else self.boxes[list(positions)],
            row_indices=[self.row_indices[position] for position in positions] if self.row_indices else [],
        )


class ImageGroups(Dataset):
    """
    A dataset of expressions seen image by image: its length counts images, and each item is an [`ImageGroup`], whose
    image is decoded once however many expressions it has.

    Args:
        dataset (`datasets.Dataset`):
            One row per expression with `image`, `image_id`, `expression` and, unless boxes are only to be predicted,
            `box`. Rows of one image share its `image_id`. The box `None` says that an expression has none; such rows
            only take part in distillation.
        decoded_side (`int`, *optional*):
            Lets JPEGs be decoded at 1/2, 1/4 or 1/8 of their size, as long as their longer side keeps at least this
            many pixels; boxes are scaled along. With 1.5 times the canvas, the canvas differs from that of the whole
            image by a few of 255 levels on average, most where photos are full of fine detail
            (`examples/benchmarks/input.py --images FOLDER` measures it). Augmentation changes more, but the numbers of
            an evaluation could change, so [`EpmVGTrainer`] does this only for training images that are augmented.

    Attributes:
        groups (`list[list[int]]`): for each image the indices of its rows.

    Raises:
        ValueError: the dataset lacks a column.

    Example:

    ```python
    >>> from epmvg_hf import ImageGroups

    >>> groups = ImageGroups(dataset)
    >>> len(dataset), len(groups)
    (32, 4)
    >>> groups[3].expressions[:2], groups[3].boxes.shape
    (['red star', 'the lowest red circle'], (8, 4))
    ```
    """

    def __init__(self, dataset: "datasets.Dataset", decoded_side: int | None = None):
        missing = {"image", "image_id", "expression"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"the dataset lacks the column(s) {', '.join(sorted(missing))}; "
                f"it has {', '.join(dataset.column_names)}"
            )
        self.images = dataset.select_columns(["image"])
        self.decoded_side = decoded_side
        if decoded_side is not None:
            self._encoded = self.images.cast_column("image", replace(self.images.features["image"], decode=False))
        self.rows = dataset.select_columns([c for c in ("image_id", "expression", "box") if c in dataset.column_names])
        by_image = defaultdict(list)
        for index, image_id in enumerate(self.rows.select_columns(["image_id"])[:]["image_id"]):
            by_image[image_id].append(index)
        self.groups = list(by_image.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> ImageGroup:
        return self.group(index)

    def group(self, index: int, with_image: bool = True) -> ImageGroup:
        """
        The image at `index`.

        Args:
            index (`int`): its number.
            with_image (`bool`, *optional*, defaults to `True`): whether to decode the image; else it is `None`.

        Example:

        ```python
        >>> from epmvg_hf import ImageGroups

        >>> group = ImageGroups(dataset).group(3, with_image=False)
        >>> group.image, len(group.expressions)
        (None, 8)
        ```
        """
        row_indices = self.groups[index]
        columns = self.rows[row_indices]
        image, scale = self._decode(row_indices[0]) if with_image else (None, 1.0)
        return ImageGroup(
            image=image,
            image_id=columns["image_id"][0],
            expressions=columns["expression"],
            boxes=boxes_to_array(columns["box"]) * np.float32(scale) if "box" in columns else None,
            row_indices=row_indices,
            index=index,
        )

    def _decode(self, row: int) -> tuple[Image.Image | None, float]:
        """The image of a row, and how many of its pixels stand for one of the stored image in each direction."""
        if self.decoded_side is not None:
            encoded, mode = self._encoded[row]["image"], self.images.features["image"].mode
            decoded = None if encoded is None else decode_jpeg(encoded, self.decoded_side)
            if decoded is not None:
                image, scale = decoded
                return image if mode is None else image.convert(mode), scale
        return self.images[row]["image"], 1.0


class CaptionedGroups(Dataset):
    """
    Labelled images, and `ratio` captioned images for each of them, as one dataset of [`ImageGroup`]s. An epoch shows
    every labelled image once. The captioned images take turns in an order of their own, and each epoch goes on where
    the one before stopped. Their expressions have no boxes.

    Args:
        labelled ([`ImageGroups`]): images with boxes.
        captioned ([`ImageGroups`]): images with expressions or sentences; their boxes, if any, are not read.
        ratio (`float`): how many captioned images there are for each labelled image.
        seed (`int`): decides the order of the captioned images.

    Raises:
        ValueError: there is no captioned image.

    Example:

    ```python
    >>> from epmvg_hf import ImageGroups
    >>> from epmvg_hf.data.image_groups import CaptionedGroups

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
        no_boxes = np.full((len(group), 4), np.nan, np.float32)
        return replace(group, boxes=no_boxes, index=len(self.labelled) + captioned_index)

    def __getitems__(self, indices: Sequence[int]) -> list[ImageGroup]:
        """
        The images of a batch, for PyTorch's data loader: the labelled ones first, otherwise in the order of `indices`.
        Augmentation and dropout draw in this order, so the numbers of a run with a seed depend on it.
        """
        return [self[index] for index in sorted(indices, key=lambda index: index >= len(self.labelled))]


def merge_groups(groups: Iterable[ImageGroup]) -> list[ImageGroup]:
    """
    Makes one group of all that are of the same image, by their `index` and `image_id`: a sampler may draw an image
    several times. Expressions that come several times stay, so each of them counts as often as it was drawn.

    Args:
        groups (`Iterable[ImageGroup]`): groups of one dataset, all or none of them with `boxes` and `row_indices`.

    Returns:
        `list[ImageGroup]`: one for each image, in the order of their first appearance.
    """
    by_image = defaultdict(list)
    for group in groups:
        by_image[group.index, group.image_id].append(group)
    return [_join(same) if len(same) > 1 else same[0] for same in by_image.values()]


def _join(groups: list[ImageGroup]) -> ImageGroup:
    boxes = [group.boxes for group in groups if group.boxes is not None]
    return replace(
        groups[0],
        expressions=[expression for group in groups for expression in group.expressions],
        boxes=np.concatenate(boxes) if boxes else None,
        row_indices=[index for group in groups for index in group.row_indices],
    )


def group_rows(rows: Iterable[dict[str, Any]]) -> list[ImageGroup]:
    """
    Groups rows that are read one by one, as from a stream. [`ImageGroups`] does this for a whole dataset.

    Args:
        rows (`Iterable[dict]`): rows with `image`, `image_id` and `expression`, all or none of them with `box` and
            with `row_index`.

    Returns:
        `list[ImageGroup]`: one for each `image_id`, in the order of their first rows.
    """
    return merge_groups(
        ImageGroup(
            image=row["image"],
            image_id=row["image_id"],
            expressions=[row["expression"]],
            boxes=boxes_to_array([row["box"]]) if "box" in row else None,
            row_indices=[row["row_index"]] if "row_index" in row else [],
        )
        for row in rows
    )


def boxes_to_array(boxes: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Boxes as a float32 array `(n, 4)`. Here, and nowhere else, the `None` of a missing box becomes a row of NaN."""
    return np.array([[np.nan] * 4 if box is None else box for box in boxes], np.float32).reshape(-1, 4)


def number_rows(dataset: "datasets.IterableDataset", reader: int, readers: int) -> "datasets.IterableDataset":
    """
    Adds a `row_index` to the rows of a stream, which no two readers of the dataset give to different rows.

    Args:
        dataset (`datasets.IterableDataset`): the stream.
        reader (`int`): the number of this process among those that read shards of their own.
        readers (`int`): how many such processes there are; 1 if all of them read the same rows.
    """
    return dataset.map(_number_row, with_indices=True, fn_kwargs={"reader": reader, "readers": readers})


def _number_row(row: dict[str, Any], index: int, reader: int, readers: int) -> dict[str, int]:
    """Every process, and every worker of a data loader, counts its own rows from 0: interleaved, none collide."""
    worker = get_worker_info()
    if worker is not None:
        reader, readers = reader * worker.num_workers + worker.id, readers * worker.num_workers
    return {"row_index": index * readers + reader}
