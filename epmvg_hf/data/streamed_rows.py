"""Rows that are read one by one, as from a stream: their numbers, and the images that they share."""

from collections.abc import Iterable
from typing import Any

import datasets
from torch.utils.data import get_worker_info

from .image_groups import ImageGroup, make_group, merge_groups


def group_rows(rows: Iterable[dict[str, Any]]) -> list[ImageGroup]:
    """
    Groups rows that are read one by one, as from a stream. [`ImageGroups`] does this for a whole dataset.

    Args:
        rows (`Iterable[dict]`): rows with `image` and `expression`, all or none of them with `image_id`, `box` and
            `row_index`.

    Returns:
        `list[ImageGroup]`: one for each image, in the order of their first rows. Rows share an image if they agree in
        `image_id` and pixels.

    Raises:
        ValueError: a row cannot be used.
    """
    return merge_groups(map(make_group, rows))


def number_rows(dataset: datasets.IterableDataset, reader: int, readers: int) -> datasets.IterableDataset:
    """
    Adds a `row_index` to the rows of a stream, which no two readers of the dataset give to different rows. With one
    reader it is the number of the row in the stream. Formats such as "torch" are undone.

    Args:
        dataset (`datasets.IterableDataset`): the stream.
        reader (`int`): the number of this process among those that read shards of their own.
        readers (`int`): how many such processes there are; 1 if all of them read the same rows.
    """
    numbering = {"reader": reader, "readers": readers}
    dataset = dataset.with_format(None)
    if dataset.features is not None and dataset.features.get("image") == datasets.Image(mode="RGB"):
        # Pillow's own conversion makes 16-bit gray white, and transparent ground black. The processor does better.
        dataset = dataset.cast_column("image", datasets.Image())
    return dataset.map(_number_row, with_indices=True, fn_kwargs=numbering)


def _number_row(row: dict[str, Any], index: int, reader: int, readers: int) -> dict[str, int]:
    """Every process, and every worker of a data loader, counts its own rows from 0: interleaved, none collide."""
    worker = get_worker_info()
    if worker is not None:
        reader, readers = reader * worker.num_workers + worker.id, readers * worker.num_workers
    return {"row_index": index * readers + reader}
