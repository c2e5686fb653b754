"""
The teacher's embeddings, computed once and read back in every training step.

The files are Arrow files that `datasets` reads. Two steps are not left to `datasets`. Files are written shard by
shard, so that an interrupted computation can go on and several processes can share it, which `Dataset.map` does not
offer. And embeddings become tensors directly from Arrow's buffers: for a batch of 16 images with 8 x 8 patches of 128
dimensions this takes about 1 ms, where the format "torch" of `datasets` takes 90 ms, as long as a training step.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..data.image_groups import ImageGroups

if TYPE_CHECKING:
    from ..model.image_processing_epmvg import EpmVGImageProcessor
    from .clip_teacher import ClipTeacher

# Part of every key. Raise it when a change of the code changes the files, or the pixels that the teacher sees.
_FORMAT_VERSION = 1

# A shard is the unit in which processes share the work, and all that is lost when one of them is killed.
_IMAGES_PER_SHARD = 256
_EXPRESSIONS_PER_SHARD = 4096

# Settings of an image processor that have no influence on the pixels.
_IRRELEVANT_SETTINGS = ("image_processor_type", "processor_class")


class TeacherCache:
    """
    Embeddings of images, their patches, and expressions, for training without augmentation. They stay on disk in
    float16 and are memory-mapped: an image with h x w patches of e dimensions takes 2 * e * (h * w + 1) bytes. A cache
    can be sent to other processes, such as the workers of a data loader. Made with [`~TeacherCache.build`].

    Args:
        image_shards (`Sequence[Path]`): Arrow files with `image_embeds` and, optionally, `patch_embeds`.
        expression_shards (`Sequence[Path]`): Arrow files with `expression` and `text_embeds`.

    Raises:
        ValueError: the embeddings in two files differ in shape, or only some files have patches.

    Example:

    ```python
    >>> from epmvg_hf.distillation.teacher_cache import TeacherCache

    >>> cache = TeacherCache.build(teacher, dataset, processor.image_processor, cache_dir="outputs/teacher")
    >>> embeds = cache.lookup(groups=[0, 1], expressions=["red star"])  # of two images and one expression
    >>> embeds["teacher_patch_embeds"].shape, embeds["teacher_text_embeds"].shape
    (torch.Size([2, 8, 8, 128]), torch.Size([1, 128]))
    ```
    """

    def __init__(self, image_shards: Sequence[Path], expression_shards: Sequence[Path]):
        self.image_shards, self.expression_shards = list(image_shards), list(expression_shards)
        self._images, self._expressions = _open(self.image_shards), _open(self.expression_shards)
        texts = self._expressions[:]["expression"].to_pylist()
        self._expression_rows = {text: row for row, text in enumerate(texts)}

    @classmethod
    def build(
        cls,
        teacher: "ClipTeacher",
        dataset: datasets.Dataset,
        image_processor: "EpmVGImageProcessor",
        cache_dir: str | os.PathLike | None = None,
        output_patches: bool = True,
        batch_size: int = 64,
        disable_tqdm: bool = False,
    ) -> "TeacherCache":
        """
        Computes the embeddings that are not on disk yet. After an interruption it goes on where it stopped. Processes
        that build the same cache at the same time share the work, and each returns when everything is there. The
        teacher computes under the caller's autocast.

        What identifies a cache is the teacher's fingerprint, the dtype that it computes in, the settings of the image
        processor, and the fingerprint of the dataset. A dataset whose fingerprint is random therefore gets a new cache
        every time, and image files that are replaced without changing the dataset go unnoticed.

        Args:
            teacher ([`ClipTeacher`]): runs on the device of its parameters.
            dataset (`datasets.Dataset`):
                Rows with `image`, `image_id` and `expression`. Image i of the cache is image i of
                [`~image_groups.ImageGroups`] of this dataset.
            image_processor ([`EpmVGImageProcessor`]): makes the canvases that the teacher sees, without augmentation.
            cache_dir (`str` or `os.PathLike`, *optional*):
                The folder in which each cache gets a folder. Defaults to a folder in the cache of `datasets`.
            output_patches (`bool`, *optional*, defaults to `True`): whether to keep patch embeddings.
            batch_size (`int`, *optional*, defaults to 64): how many images or expressions the teacher sees at a time.
            disable_tqdm (`bool`, *optional*, defaults to `False`): whether to hide the progress bars.

        Raises:
            ValueError: the dataset has no rows, or a row has no image.
        """
        if len(dataset) == 0:
            raise ValueError("the teacher cannot be cached for a dataset without rows")
        groups = ImageGroups(dataset)
        image_rows = [rows[0] for rows in groups.groups]
        expressions = list(dict.fromkeys(groups.rows.select_columns(["expression"])[:]["expression"]))
        device = next(teacher.parameters()).device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = {
            "format_version": _FORMAT_VERSION,
            "teacher": teacher.fingerprint,
            "embed_dim": teacher.embed_dim,
            "autocast": str(autocast),
            "output_patches": output_patches,
            "image_processor": _settings_of(image_processor),
            "dataset": dataset._fingerprint,
            "images": len(image_rows),
            "expressions": len(expressions),
            "images_per_shard": _IMAGES_PER_SHARD,
            "expressions_per_shard": _EXPRESSIONS_PER_SHARD,
        }
        folder = _make_folder(cache_dir, key)
        image_columns = ("image_embeds", "patch_embeds") if output_patches else ("image_embeds",)
        text_columns = ("expression", "text_embeds")

        def encode_images(start: int, stop: int) -> dict[str, np.ndarray]:
            images = groups.images[image_rows[start:stop]]["image"]
            for row, image in zip(image_rows[start:stop], images, strict=True):
                if image is None:
                    raise ValueError(f"the teacher cannot be cached for row {row} of the dataset, which has no image")
            pixel_values = image_processor(images=images, return_tensors="pt")["pixel_values"].to(device)
            canvases = image_processor.unnormalize(pixel_values)
            image_embeds, patch_embeds = teacher.encode_images(canvases, output_patches=output_patches)
            columns = {"image_embeds": _to_half(image_embeds)}
            return columns if patch_embeds is None else {**columns, "patch_embeds": _to_half(patch_embeds)}

        def encode_expressions(start: int, stop: int) -> dict[str, np.ndarray]:
            batch = expressions[start:stop]
            return {"expression": np.array(batch, object), "text_embeds": _to_half(teacher.encode_texts(batch))}

        image_shards = _split(folder, "images", len(image_rows), _IMAGES_PER_SHARD, image_columns)
        expression_shards = _split(folder, "expressions", len(expressions), _EXPRESSIONS_PER_SHARD, text_columns)
        _complete(image_shards, encode_images, batch_size, "Teacher: images", disable_tqdm)
        _complete(expression_shards, encode_expressions, batch_size, "Teacher: expressions", disable_tqdm)
        return cls([shard.path for shard in image_shards], [shard.path for shard in expression_shards])

    @classmethod
    def concatenate(cls, caches: Sequence["TeacherCache"]) -> "TeacherCache":
        """
        One cache for several datasets: the images of the first, then those of the second, and so on, and the
        expressions of all. All caches must be of the same teacher.

        Raises:
            ValueError: the embeddings differ in shape, or only some of the caches have patches.
        """
        return cls(
            [path for cache in caches for path in cache.image_shards],
            [path for cache in caches for path in cache.expression_shards],
        )

    def lookup(self, groups: Sequence[int], expressions: Sequence[str]) -> dict[str, torch.Tensor]:
        """
        Reads the embeddings of a batch.

        Args:
            groups (`Sequence[int]`): numbers of B images, see [`~TeacherCache.build`].
            expressions (`Sequence[str]`): N expressions.

        Returns:
            `dict` of float32 tensors, in the order of the arguments; unit vectors up to the rounding to float16:
            - **teacher_image_embeds** `(B, e)`,
            - **teacher_text_embeds** `(N, e)`,
            - **teacher_patch_embeds** `(B, h, w, e)`, if built with patches.

        Raises:
            IndexError: the cache has no image with such a number.
            ValueError: the cache does not have an expression.
        """
        try:
            expression_rows = [self._expression_rows[expression] for expression in expressions]
        except KeyError as error:
            raise ValueError(f"the teacher cache has no expression {error.args[0]!r}") from None
        missing = [group for group in groups if not 0 <= group < len(self._images)]
        if missing:
            raise IndexError(f"the teacher cache has {len(self._images)} images, so there is no image {missing[0]}")
        images, texts = self._images[list(groups)], self._expressions[expression_rows]
        embeds = {f"teacher_{name}": _from_arrow(images[name]) for name in images.column_names}
        return {**embeds, "teacher_text_embeds": _from_arrow(texts["text_embeds"])}

    def __reduce__(self) -> tuple:
        # Only the names of the files are pickled. The process that unpickles them maps the files again.
        return TeacherCache, (self.image_shards, self.expression_shards)


@dataclass
class _Shard:
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
        """Whether the file is there and whole, and has the expected columns and number of rows."""
        try:
            shard = datasets.Dataset.from_file(str(self.path))
        except (OSError, ValueError, pa.ArrowException):
            return False
        return tuple(shard.column_names) == self.columns and len(shard) == len(self)

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Writes the columns to the file."""
        batch = pa.record_batch({name: _to_arrow(array) for name, array in columns.items()})
        # The name is always the same, so that what a killed process left behind is overwritten.
        temporary = self.path.with_suffix(".tmp")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        temporary.replace(self.path)


def _open(paths: Sequence[Path]) -> datasets.Dataset:
    """The rows of all files, memory-mapped, which indexing returns as Arrow tables."""
    parts = [datasets.Dataset.from_file(str(path)) for path in paths]
    kinds = {str(part.features) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"the embeddings of a teacher cache differ in shape: {' and '.join(sorted(kinds))}")
    return datasets.concatenate_datasets(parts).with_format("arrow")


def _to_arrow(array: np.ndarray) -> pa.Array:
    """An array `(n, ...)` as n nested lists of fixed sizes, or as n strings."""
    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _from_arrow(column: pa.ChunkedArray) -> torch.Tensor:
    """n nested lists of fixed sizes as a float32 tensor `(n, ...)`."""
    values, shape = column.combine_chunks(), [len(column)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    # Copied because PyTorch warns about memory that it may not write to, such as a mapped file.
    return torch.from_numpy(values.to_numpy(zero_copy_only=True).reshape(shape).copy()).float()


def _split(folder: Path, name: str, count: int, size: int, columns: tuple[str, ...]) -> list[_Shard]:
    """Divides `count` items into shards of `size` items; the last one may be smaller."""
    starts = range(0, count, size)
    return [
        _Shard(folder / f"{name}-{index:05d}-of-{len(starts):05d}.arrow", start, min(start + size, count), columns)
        for index, start in enumerate(starts)
    ]


def _complete(
    shards: list[_Shard],
    encode: Callable[[int, int], dict[str, np.ndarray]],
    batch_size: int,
    description: str,
    disable_tqdm: bool,
) -> None:
    """Returns when all shards are there. `encode` computes the columns of the items from a start to a stop."""
    missing = [shard for shard in shards if not shard.is_complete()]
    if not missing:
        return
    total = shards[-1].stop
    done = total - sum(map(len, missing))
    with tqdm(total=total, initial=done, desc=description, disable=disable_tqdm) as progress:
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
                        shard.write(_encode_shard(shard, encode, batch_size, progress))
            missing = locked_elsewhere


def _encode_shard(
    shard: _Shard,
    encode: Callable[[int, int], dict[str, np.ndarray]],
    batch_size: int,
    progress: tqdm,
) -> dict[str, np.ndarray]:
    batches = []
    for start in range(shard.start, shard.stop, batch_size):
        stop = min(start + batch_size, shard.stop)
        batches.append(encode(start, stop))
        progress.update(stop - start)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in shard.columns}


def _to_half(embeds: torch.Tensor) -> np.ndarray:
    return embeds.to("cpu", torch.float16).numpy()


def _settings_of(image_processor: "EpmVGImageProcessor") -> dict[str, Any]:
    """Everything about an image processor that decides the pixels, as JSON types."""
    settings = json.loads(image_processor.to_json_string())
    for name in _IRRELEVANT_SETTINGS:
        settings.pop(name, None)
    # The two backends resize slightly differently, but their settings do not tell them apart.
    return {"class": type(image_processor).__name__, **settings}


def _make_folder(cache_dir: str | os.PathLike | None, key: dict[str, Any]) -> Path:
    """The folder of a cache, which is named after the hash of its key. A file in it shows the key to people."""
    root = Path(datasets.config.HF_DATASETS_CACHE) / "epmvg_teacher" if cache_dir is None else Path(cache_dir)
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key.json").exists():
        # Several processes may do this at the same time, but all write the same content.
        (folder / "key.json").write_text(json.dumps(key, indent=2) + "\n")
    return folder
