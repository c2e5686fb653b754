"""The outputs of a frozen teacher, computed once and read back in every training step."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from ..model.image_processing_epmvg import EpmVGImageProcessor
    from .clip_teacher import ClipTeacher

# Part of every key: to be raised when the files, or the pixels that the teacher sees, become other ones.
_FORMAT_VERSION = 1

# What is lost at most when a process is killed, and what several processes share the work by.
_IMAGES_PER_SHARD = 256
_EXPRESSIONS_PER_SHARD = 4096

# What an image processor knows about its surroundings; the rest of its settings decides the pixels.
_IRRELEVANT_SETTINGS = ("image_processor_type", "processor_class")


class TeacherCache:
    """
    Embeddings of images, their patches, and expressions, for training without augmentation. They lie on disk in
    float16, memory-mapped; an image with h x w patches of e dimensions takes 2 * e * (h * w + 1) bytes. It can be
    pickled and forked. Made with [`~TeacherCache.build`].

    Args:
        image_shards (`Sequence[Path]`): Arrow files with `image_embeds` and, if wanted, `patch_embeds`.
        expression_shards (`Sequence[Path]`): Arrow files with `expression` and `text_embeds`.

    Raises:
        ValueError: the embeddings of two files differ in shape.

    Example:

    ```python
    >>> from epmvg_hf.distillation.teacher_cache import TeacherCache

    >>> cache = TeacherCache.build(teacher, dataset, processor.image_processor, cache_dir="outputs/teacher")
    >>> embeds = cache.lookup(groups=[0, 1], expressions=["red star"])  # of the first images, and of one expression
    >>> embeds["teacher_patch_embeds"].shape, embeds["teacher_text_embeds"].shape
    (torch.Size([2, 8, 8, 128]), torch.Size([1, 128]))
    ```
    """

    def __init__(self, image_shards: Sequence[Path], expression_shards: Sequence[Path]):
        self.image_shards, self.expression_shards = list(image_shards), list(expression_shards)
        images = [_read_shard(path) for path in self.image_shards]
        expressions = [_read_shard(path) for path in self.expression_shards]
        names = [name for name in ("image_embeds", "patch_embeds") if any(name in shard for shard in images)]
        self._image_columns = {f"teacher_{name}": _Column([shard.get(name) for shard in images]) for name in names}
        self._text_embeds = _Column([shard["text_embeds"] for shard in expressions])
        texts = (text for shard in expressions for text in shard["expression"])
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
        Computes what is not on disk yet. An interrupted build goes on where it stopped; processes that build the same
        cache at the same time share the work, and none returns before all is there. The teacher computes in the
        caller's autocast.

        A cache is found again by the teacher's fingerprint, the dtype it computes in, the settings of the image
        processor and the fingerprint of the dataset. A dataset whose fingerprint is random gets a new cache every
        time; image files that are replaced behind an unchanged dataset are not noticed.

        Args:
            teacher ([`ClipTeacher`]): is run where its parameters are.
            dataset (`datasets.Dataset`):
                Rows with `image`, `image_id` and `expression`. Image i of the cache is image i of
                [`~image_groups.ImageGroups`] of this dataset.
            image_processor ([`EpmVGImageProcessor`]): makes the canvas, with its settings, in evaluation geometry.
            cache_dir (`str` or `os.PathLike`, *optional*):
                Each cache has a folder of its own in this one. Defaults to a folder in the cache of `datasets`.
            output_patches (`bool`, *optional*, defaults to `True`): whether to keep patch embeddings.
            batch_size (`int`, *optional*, defaults to 64): images, or expressions, that the teacher sees at a time.
            disable_tqdm (`bool`, *optional*, defaults to `False`): show no progress.

        Raises:
            ValueError: the dataset has no rows, or a row has no image.
        """
        # Here, as the collator in turn knows the cache.
        from ..data.image_groups import ImageGroups

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
        One cache of several datasets: the images of the first, then those of the second, and so on; the expressions
        of all. The caches must be of one teacher.

        Raises:
            ValueError: the embeddings differ in shape, or only some of the caches have patches.
        """
        return cls(
            [path for cache in caches for path in cache.image_shards],
            [path for cache in caches for path in cache.expression_shards],
        )

    def lookup(self, groups: Sequence[int], expressions: Sequence[str]) -> dict[str, torch.Tensor]:
        """
        Args:
            groups (`Sequence[int]`): B images, see [`~TeacherCache.build`].
            expressions (`Sequence[str]`): N expressions.

        Returns:
            `dict`, float32, of length 1 up to the rounding to float16, in the order asked for:
            - **teacher_image_embeds** `(B, e)`,
            - **teacher_text_embeds** `(N, e)`,
            - **teacher_patch_embeds** `(B, h, w, e)`, if built with patches.

        Raises:
            IndexError: there is no such image.
            ValueError: there is no such expression.
        """
        try:
            expression_rows = [self._expression_rows[expression] for expression in expressions]
        except KeyError as error:
            raise ValueError(f"the teacher cache has no expression {error.args[0]!r}") from None
        embeds = {name: column.take(groups) for name, column in self._image_columns.items()}
        return {**embeds, "teacher_text_embeds": self._text_embeds.take(expression_rows)}

    def __reduce__(self) -> tuple:
        # Files, not their content: whoever unpickles maps them anew.
        return TeacherCache, (self.image_shards, self.expression_shards)


class _Column:
    """
    Arrays `(n, ...)` of several shards, read as if they were one.

    Raises:
        ValueError: the arrays differ in more than their lengths, or one is `None`.
    """

    def __init__(self, shards: list[np.ndarray | None]):
        shapes = {None if shard is None else shard.shape[1:] for shard in shards}
        if len(shapes) > 1:
            raise ValueError(f"the embeddings of a teacher cache differ in shape: {', '.join(map(str, shapes))}")
        self.shards = [shard for shard in shards if shard is not None]  # by now all
        self.stops = list(accumulate(map(len, self.shards)))

    def take(self, rows: Sequence[int]) -> torch.Tensor:
        """`(len(rows), ...)`."""
        taken = np.empty((len(rows), *self.shards[0].shape[1:]), self.shards[0].dtype)
        for place, row in enumerate(rows):
            if not 0 <= row < self.stops[-1]:
                raise IndexError(f"the teacher cache has {self.stops[-1]} images, and there is no number {row}")
            shard = bisect_right(self.stops, row)
            # Counted from the end of the shard.
            taken[place] = self.shards[shard][row - self.stops[shard]]
        # PyTorch converts several times as fast as NumPy.
        return torch.from_numpy(taken).float()


@dataclass
class _Shard:
    """
    The file that holds the items from `start` to `stop`. It gets its name when it is complete, by which it is known
    to be; everything else is done while holding `lock`, a lock of the operating system, which ends with its process.
    """

    path: Path
    start: int
    stop: int
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def lock(self) -> FileLock:
        """Held by the process that computes the items."""
        return FileLock(self.path.with_suffix(".lock"))

    def is_complete(self) -> bool:
        """Whether the file is there and neither truncated nor another one, as far as its header tells."""
        try:
            shard = _read_shard(self.path)
        except (OSError, ValueError, pa.ArrowException):
            return False
        return tuple(shard) == self.columns and all(len(column) == len(self) for column in shard.values())

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Writes the columns; the file gets its name when all of it is there."""
        batch = pa.record_batch({name: _to_arrow(array) for name, array in columns.items()})
        # One name for all attempts: what a killed process left there is overwritten.
        temporary = self.path.with_suffix(".tmp")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        temporary.replace(self.path)


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    """
    The columns of a shard, embeddings as read-only float16 views `(n, ...)` of the memory-mapped file, texts as `str`.

    Raises:
        OSError, ValueError, pa.ArrowException: the file is not there, or is no whole Arrow stream of one batch.
    """
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        (batch,) = stream
    batch.validate()
    return dict(zip(batch.schema.names, map(_from_arrow, batch.columns), strict=True))


def _to_arrow(array: np.ndarray) -> pa.Array:
    """`(n, ...)` as n fixed-size lists, nested, which `datasets.Dataset.from_file` reads too."""
    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _from_arrow(column: pa.Array) -> np.ndarray:
    if pa.types.is_string(column.type):
        return column.to_numpy(zero_copy_only=False)
    shape = [len(column)]
    while pa.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    return column.to_numpy(zero_copy_only=True).reshape(shape)


def _split(folder: Path, name: str, count: int, size: int, columns: tuple[str, ...]) -> list[_Shard]:
    """`count` items as shards of `size` items each, but for the last."""
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
    """Returns when all shards are there. `encode` gives the columns of the items from a start to a stop."""
    missing = [shard for shard in shards if not shard.is_complete()]
    if not missing:
        return
    total = shards[-1].stop
    done = total - sum(map(len, missing))
    with tqdm(total=total, initial=done, desc=description, disable=disable_tqdm) as progress:
        # First what no other process is at; then wait for the others, and do what they did not finish.
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
    """All that decides the pixels, in terms of JSON."""
    settings = json.loads(image_processor.to_json_string())
    for name in _IRRELEVANT_SETTINGS:
        settings.pop(name, None)
    # The backends resize a little differently, and call themselves the same in their settings.
    return {"class": type(image_processor).__name__, **settings}


def _make_folder(cache_dir: str | os.PathLike | None, key: dict[str, Any]) -> Path:
    """The folder for this key, with the key in it for people to read."""
    root = Path(datasets.config.HF_DATASETS_CACHE) / "epmvg_teacher" if cache_dir is None else Path(cache_dir)
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "key.json").exists():
        # Processes that do this at once write the same.
        (folder / "key.json").write_text(json.dumps(key, indent=2) + "\n")
    return folder
