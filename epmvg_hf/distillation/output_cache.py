"""
Outputs of networks that do not change, computed once and read back in every training step: the teacher's embeddings,
and the features of frozen towers.

The files are Arrow files that `datasets` reads. Two steps are not left to `datasets`. Files are written shard by
shard, so that an interrupted computation can go on and several processes can share it, which `Dataset.map` does not
offer. And arrays become tensors directly from Arrow's buffers: for a batch of 16 images with 8 x 8 patches of 128
dimensions this takes about 1 ms, where the format "torch" of `datasets` takes 90 ms, as long as a training step.
"""

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets.table import MemoryMappedTable, concat_tables
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..data.image_groups import ImageGroups

if TYPE_CHECKING:
    from ..model.image_processing_epmvg import EpmVGImageProcessor

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16

# What a cache stores of some items: for each column an array with one entry for each item, or one array `(n, ...)` for
# each item, whose n differ.
Columns = dict[str, np.ndarray | list[np.ndarray]]


@dataclass
class Shard:
    """
    A file for the items from `start` to `stop`. It is written under another name and renamed at the end, so a file
    with this name is complete. Only the holder of `lock` writes it. That is a lock of the operating system, which
    is released even when its process is killed.
    """

    path: Path
    start: int
    stop: int
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def lock(self) -> FileLock:
        """The lock that the process holds which computes the items."""
        return FileLock(self.path.with_suffix(".lock"))

    def is_complete(self) -> bool:
        """Whether the file is there, as it was written, and has the expected columns and number of rows."""
        if not self.path.is_file() or not _has_its_digest(self.path):
            return False
        table = MemoryMappedTable.from_file(str(self.path))
        return tuple(table.column_names) == self.columns and len(table) == len(self)

    def write(self, columns: Columns) -> None:
        """Writes the columns to the file."""
        batch = pa.record_batch({name: _to_arrow(values) for name, values in columns.items()})
        # The name is always the same, so that what a killed process left behind is overwritten.
        temporary = self.path.with_suffix(".tmp")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        # Arrow reads no further than the end of its stream.
        with temporary.open("ab") as file:
            file.write(_digest(temporary.read_bytes()))
        temporary.replace(self.path)


def _digest(content: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128(content).digest()


def _has_its_digest(path: Path) -> bool:
    """Whether a file ends with the digest of all that stands before."""
    with path.open("rb") as file:
        if path.stat().st_size <= _DIGEST_BYTES:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
            return _digest(content[:-_DIGEST_BYTES]) == content[-_DIGEST_BYTES:].tobytes()


def split(folder: Path, name: str, count: int, size: int, columns: tuple[str, ...]) -> list[Shard]:
    """Divides `count` items into shards of `size` items; the last one may be smaller."""
    starts = range(0, count, size)
    return [
        Shard(folder / f"{name}-{index:05d}-of-{len(starts):05d}.arrow", start, min(start + size, count), columns)
        for index, start in enumerate(starts)
    ]


def complete(
    shards: list[Shard],
    encode: Callable[[int, int], Columns],
    batch_size: int,
    description: str,
    disable_tqdm: bool,
) -> list[Path]:
    """The files of all shards, once they are there. `encode` computes the columns of the items from start to stop."""
    files = [shard.path for shard in shards]
    missing = [shard for shard in shards if not shard.is_complete()]
    if not missing:
        return files
    for shard in missing:
        if shard.path.exists():
            logger.warning("%s has changed since it was written, and is computed again", shard.path)
    total = shards[-1].stop
    done = total - sum(map(len, missing))
    # `None` shows the bar on a terminal only.
    with tqdm(total=total, initial=done, desc=description, disable=disable_tqdm or None) as progress:
        # The first round computes what no other process is computing. The second one waits for the others, and
        # computes what they left unfinished.
        for timeout in (0, -1):
            locked_elsewhere = []
            for shard in missing:
                try:
                    lock = shard.lock.acquire(timeout=timeout)
                except Timeout:
                    locked_elsewhere.append(shard)
                    continue
                with lock:
                    if shard.is_complete():
                        progress.update(len(shard))
                    else:
                        shard.write(_encode_shard(shard, encode, batch_size, description, progress))
            missing = locked_elsewhere
    return files


class CachedRows:
    """
    The rows of files, memory-mapped. They can be sent to other processes, such as the workers of a data loader.

    Args:
        shards (`Sequence[Path]`): the files.
        name (`str`): what they are, for errors.

    Raises:
        ValueError: the files differ in their columns.
    """

    def __init__(self, shards: Sequence[Path], name: str):
        self.shards, self.name = list(shards), name
        # One dataset of all tables: a dataset for each of them would compute a fingerprint for each, 2 ms a file.
        tables = [MemoryMappedTable.from_file(str(path)) for path in self.shards]
        kinds = {str(table.schema.remove_metadata()) for table in tables}
        if len(kinds) > 1:
            raise ValueError(f"the embeddings of a {name} differ in shape: {' and '.join(sorted(kinds))}")
        self._rows = datasets.Dataset(concat_tables(tables)).with_format("arrow")

    def __reduce__(self) -> tuple:
        # Only the names of the files are pickled. The process that unpickles them maps the files again.
        return type(self), (self.shards, self.name)


class CachedImages(CachedRows):
    """[`CachedRows`] of which there is one for each image."""

    def lookup(self, groups: Sequence[int]) -> pa.Table:
        """
        The rows of the images with these numbers, in their order.

        Raises:
            IndexError: there is no image with such a number.
        """
        missing = [group for group in groups if not 0 <= group < len(self._rows)]
        if missing:
            raise IndexError(f"the {self.name} has {len(self._rows)} images, so there is no image {missing[0]}")
        return self._rows[list(groups)]


class CachedExpressions(CachedRows):
    """[`CachedRows`] of which there is one for each expression, found by its column `expression`."""

    def __init__(self, shards: Sequence[Path], name: str):
        super().__init__(shards, name)
        texts = self._rows[:]["expression"].to_pylist()
        self._numbers = {text: row for row, text in enumerate(texts)}

    def lookup(self, expressions: Sequence[str]) -> pa.Table:
        """
        The rows of these expressions, in their order.

        Raises:
            ValueError: an expression is missing.
        """
        try:
            numbers = [self._numbers[expression] for expression in expressions]
        except KeyError as error:
            raise ValueError(f"the {self.name} has no expression {error.args[0]!r}") from None
        return self._rows[numbers]


def to_tensor(column: pa.ChunkedArray) -> torch.Tensor:
    """n nested lists of fixed sizes as a tensor `(n, ...)`. If the outer lists vary in size, n counts their items."""
    values = column.combine_chunks()
    if pa.types.is_list(values.type):
        values = values.flatten()
    shape = [len(values)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    # Copied because PyTorch warns about memory that it may not write to, such as a mapped file.
    return torch.from_numpy(values.to_numpy(zero_copy_only=True).reshape(shape).copy())


def make_folder(cache_dir: str | os.PathLike | None, default_name: str, key: dict[str, Any]) -> Path:
    """
    The folder of a cache, which is named after the hash of its key. A file in it shows the key to people.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): the folder in which each cache gets a folder.
        default_name (`str`): if there is none, the name of such a folder in the cache of `datasets`.
        key (`dict`): all that decides the content, as JSON types.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / default_name if cache_dir is None else Path(cache_dir)
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key.json").exists():
        # Several processes may do this at the same time, but all write the same content.
        (folder / "key.json").write_text(json.dumps(key, indent=2) + "\n")
    return folder


def process_images(
    groups: ImageGroups, start: int, stop: int, image_processor: "EpmVGImageProcessor", what: str
) -> BatchFeature:
    """
    The image processor's outputs for the images from number `start` to `stop` of a dataset.

    Args:
        groups ([`~image_groups.ImageGroups`]): the dataset.
        start, stop (`int`): the first number, and the one after the last.
        image_processor ([`EpmVGImageProcessor`]): the image processor.
        what (`str`): what is computed from the images, for the error.

    Raises:
        ValueError: a row has no image.
    """
    images = []
    for index in range(start, stop):
        images.append(groups.group(index).image)
        if images[-1] is None:
            row = groups.groups[index][0]
            raise ValueError(f"{what} cannot be cached for row {row} of the dataset, which has no image")
    return image_processor(images=images, return_tensors="pt")


def autocast_dtype(device: torch.device) -> str:
    """The dtype of the caller's autocast on a device, `"None"` outside of autocast."""
    return str(torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None)


def _encode_shard(
    shard: Shard, encode: Callable[[int, int], Columns], batch_size: int, description: str, progress: tqdm
) -> Columns:
    batches = []
    for start in range(shard.start, shard.stop, batch_size):
        stop = min(start + batch_size, shard.stop)
        batch = encode(start, stop)
        for name, values in batch.items():
            for item, value in enumerate(values):
                if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise ValueError(f"{description}: {name} of number {start + item} has NaN or infinity")
        batches.append(batch)
        progress.update(stop - start)
    return {name: _join([batch[name] for batch in batches]) for name in shard.columns}


def _join(parts: list[np.ndarray | list[np.ndarray]]) -> np.ndarray | list[np.ndarray]:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [array for part in parts for array in part]


def _to_arrow(values: np.ndarray | list[np.ndarray]) -> pa.Array:
    """
    An array `(n, ...)` as n nested lists of fixed sizes, or as n strings; n arrays `(m, ...)` as n lists of m such
    lists each.
    """
    if isinstance(values, list):
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, _to_arrow(np.concatenate(values)))
    column = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column
