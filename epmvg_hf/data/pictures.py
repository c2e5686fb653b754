"""Tells which rows of a dataset show the same picture, by what is stored: an id is a label that nobody checked."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from .files.image_files import file_statuses


def number_pictures(dataset: datasets.Dataset) -> np.ndarray:
    """
    Numbers the pictures of a dataset from 0, in the order of their first rows.

    Rows show the same picture if they agree in their `image_id`, where there is such a column, and in what is stored:
    the bytes of the file or, where there are none, its path. Rows without an image agree by their `image_id` alone.
    Bytes are read only where ids and lengths leave a doubt (`examples/benchmarks/growing_training.py` measures it).

    Args:
        dataset (`datasets.Dataset`): rows with `image`, of the feature `datasets.Image`.

    Returns:
        `np.ndarray` of shape `(len(dataset),)`: the number of the picture of each row.
    """
    table, used = dataset.data, None
    if (shown := _shown_rows(dataset)) is not None:
        used, positions = np.unique(shown, return_inverse=True)
    stored = table.column("image")
    content, paths = pc.struct_field(stored, "bytes"), pc.struct_field(stored, "path")
    lengths = pc.fill_null(pc.binary_length(content), -1).to_numpy()
    # The path beside bytes is of another machine, and is not read.
    labels = [_number_values(pc.if_else(pc.is_valid(content), None, paths)), lengths]
    if "image_id" in table.column_names:
        labels.append(_number_values(table.column("image_id")))
    if used is not None:
        labels = [label[used] for label in labels]
    pictures = _combine(labels)
    lengths = labels[1]

    # What agrees in label and length, but was stored several times, may still differ.
    doubtful = np.flatnonzero((np.bincount(pictures)[pictures] > 1) & (lengths > 0))
    digests = np.zeros(len(pictures), np.int64)
    known: dict[bytes, int] = {}
    for row in doubtful.tolist():
        buffer = content[row if used is None else int(used[row])].as_buffer()
        digests[row] = known.setdefault(xxhash.xxh3_128_digest(buffer), len(known))
    pictures = _combine([pictures, digests])
    return _number_by_appearance(pictures if used is None else pictures[positions])


def fingerprint_files(dataset: datasets.Dataset) -> str:
    """
    A digest of the sizes and times of change of the image files that a dataset names by their paths. It changes when a
    file is replaced, which the fingerprint of the dataset does not notice. Paths that lead nowhere are left out.

    Args:
        dataset (`datasets.Dataset`): rows with `image`, of the feature `datasets.Image`.
    """
    stored = dataset.data.column("image")
    if (shown := _shown_rows(dataset)) is not None:
        stored = stored.filter(np.isin(np.arange(len(stored)), shown))
    paths = pc.struct_field(stored.filter(pc.is_null(pc.struct_field(stored, "bytes"))), "path").unique()
    files = [path for path in paths.to_pylist() if path is not None and Path(path).is_file()]
    return hashlib.sha256(file_statuses(files).encode()).hexdigest()[:32]


def _shown_rows(dataset: datasets.Dataset) -> np.ndarray | None:
    """The stored rows that a selection or a shuffled dataset shows, in its order; `None` for all of them."""
    return None if dataset._indices is None else dataset._indices.column(0).to_numpy()


def _number_values(column: pa.ChunkedArray) -> np.ndarray:
    """A number for each value of a column, the same for equal values."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.indices.to_numpy(zero_copy_only=False)


def _combine(labels: Sequence[np.ndarray]) -> np.ndarray:
    """A number from 0 for each row, the same for rows that agree in all labels."""
    combined = np.zeros(len(labels[0]), np.int64)
    for label in labels:
        distinct, numbers = np.unique(label, return_inverse=True)
        _, combined = np.unique(combined * len(distinct) + numbers, return_inverse=True)
    return combined


def _number_by_appearance(numbers: np.ndarray) -> np.ndarray:
    """The same partition of the rows, numbered in the order of the first row of each part."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[inverse]
