"""
Prepares rows of image, expression and box with `datasets`, from any source of annotations. Rows are checked as they
are made, kept in the cache of `datasets`, and prepared again when the files that they depend on have changed.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from .annotations import place_rows
from .files.image_files import measure_image
from .progress import bars_only_on_a_terminal
from .readers.source import GroundingSource

logger = logging.getLogger(__name__)

ROWS_PER_TABLE = 1_000
MAX_REPORTED = 20  # problems that errors="skip" logs in full; the others are only counted


def open_source(
    source: GroundingSource,
    missing_images: str = "error",
    errors: str = "raise",
    exclude: frozenset[str] = frozenset(),
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Opens the rows of a source, from the cache if they were prepared before.

    Args:
        source ([`~readers.source.GroundingSource`]): One split in one format.
        missing_images, errors, exclude, streaming, num_proc, cache_dir: See [`load_grounding_dataset`].

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: One row per expression; the rows of an image are consecutive.

    Raises:
        `FileNotFoundError`: Images are missing, and `missing_images` does not allow that.
        `ValueError`: An annotation or image cannot be used and `errors` is `"raise"`, or no row is left.
    """
    builder = GroundingBuilder(
        dataset_name=source.name,  # also the name of the folder in the cache
        hash=source.fingerprint(),
        cache_dir=cache_dir,
        source=source,
        missing_images=missing_images,
        errors=errors,
        exclude=exclude,
    )
    if streaming:
        return builder.as_streaming_dataset(split=source.split)
    with bars_only_on_a_terminal():
        builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split=source.split)


@dataclass(kw_only=True)
class GroundingConfig(datasets.BuilderConfig):
    """The source of the rows, and what to do with annotations and images that cannot be used."""

    source: GroundingSource
    missing_images: str = "error"
    errors: str = "raise"
    exclude: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.missing_images not in ("error", "skip", "keep"):
            raise ValueError(f'missing_images must be "error", "skip" or "keep", not {self.missing_images!r}.')
        if self.errors not in ("raise", "skip"):
            raise ValueError(f'errors must be "raise" or "skip", not {self.errors!r}.')

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        # The id names a folder in the cache, so settings that make other rows of the same files need another id.
        parts = [self.source.split, self.missing_images, self.errors]
        if self.exclude:
            parts.append(hashlib.sha256("\n".join(sorted(self.exclude)).encode()).hexdigest()[:16])
        return "-".join(parts)


class GroundingBuilder(datasets.ArrowBasedBuilder):
    """
    Prepares the one split of its source.

    It makes Arrow tables itself: the base class for single rows inspects each value of each row in Python, which takes
    twice as long (15 s against 9 s for the four splits of RefCOCO).
    """

    VERSION = datasets.Version("2.0.0")  # raise it when a change of the code makes other rows of the same files
    BUILDER_CONFIG_CLASS = GroundingConfig

    # All problems that this process has met while it prepares rows; `None` in a stream.
    problems: list[str] | None = None

    def _info(self) -> datasets.DatasetInfo:
        columns = {
            "image": datasets.Image(),
            "image_id": datasets.Value("string"),
            "expression": datasets.Value("string"),
            "box": datasets.List(datasets.Value("float32"), length=4),
            **self.config.source.columns,
        }
        return datasets.DatasetInfo(features=datasets.Features(columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config, source = self.config, self.config.source
        items, problems = source.list_images()
        items = [item for item in items if source.image_id_of(item) not in config.exclude]
        found, misnamed = _find_images(source, items)
        _handle_problems(problems + misnamed, config.errors)
        missing = [item for item, path in found if path is None]
        usable = [item for item, path in found if path is not None or config.missing_images == "keep"]
        if missing and config.missing_images != "keep":
            summary = f"{len(missing):,} of {len(items):,} images of the {source.split} split are missing"
            if config.missing_images == "error" or not usable:
                raise FileNotFoundError(
                    f"{summary} (looked in {source.images.describe()}; one of them is {source.name_of(missing[0])}); "
                    'missing_images="skip" leaves out their rows (not all), "keep" gives rows without image.'
                )
            num_rows = sum(len(read_image(source, item)[1]) for item in missing)
            logger.warning(f"{summary} in {source.images.describe()}: their {num_rows:,} rows are left out.")
        if not usable:
            raise ValueError(f"no image of the {source.split} split of {source.name} is left, expected at least one.")
        # `datasets` shares this list out among processes, and splits a stream of it between the workers of a loader.
        return [datasets.SplitGenerator(source.split, {"items": usable, "reported": set()})]

    def _generate_tables(self, items: list, reported: set[str]) -> Iterator[tuple[int, pa.Table]]:
        schema = self.info.features.arrow_schema
        rows = self._generate_rows(items, reported)
        number = 0
        while batch := list(itertools.islice(rows, ROWS_PER_TABLE)):
            yield number, pa.Table.from_pylist(batch, schema)
            number += 1

    def _generate_rows(self, items: list, reported: set[str]) -> Iterator[dict[str, Any]]:
        source = self.config.source
        for item in items:
            path, rows, problems = read_image(source, item)
            if problems and self.config.errors == "raise":
                raise ValueError(problems[0])
            if self.problems is None:
                _report_once(problems, reported)
            else:
                self.problems += problems
            image = None if path is None else {"bytes": None, "path": path}
            shared = {"image": image, "image_id": source.image_id_of(item)}
            yield from (row | shared for row in rows)

    def _prepare_split(self, split_generator: datasets.SplitGenerator, **kwargs: Any) -> None:
        super()._prepare_split(split_generator, **kwargs)
        problems: list[str] = []
        for path in sorted(Path(self._output_dir).glob("problems-*.json")):
            problems += json.loads(path.read_text())
            path.unlink()
        _handle_problems(problems, "skip")
        if not split_generator.split_info.num_examples:
            source = self.config.source
            raise ValueError(f"no row of the {source.split} split of {source.name} is left, expected at least one.")

    def _prepare_split_single(self, *, fpath: str, job_id: int, **kwargs: Any) -> Iterator:
        self.problems = []
        try:
            yield from super()._prepare_split_single(fpath=fpath, job_id=job_id, **kwargs)
        except datasets.exceptions.DatasetGenerationError as error:
            # `datasets` wraps the error in one of its own, and loses the cause on the way out of another process.
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise
        # This may be another process, whose log nobody sees, so the problems go to the main process in a file.
        Path(fpath).with_name(f"problems-{job_id:05d}.json").write_text(json.dumps(self.problems))


def _find_images(source: GroundingSource, items: list[Any]) -> tuple[list[tuple[Any, str | None]], list[str]]:
    """Items with the path of each image (`None` if it is missing), and a sentence for each forbidden name."""
    found, problems = [], []
    for item in items:
        try:
            found.append((item, source.path_of(item)))
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def read_image(source: GroundingSource, item: Any) -> tuple[str | None, list[dict[str, Any]], list[str]]:
    """The path of an image, its usable rows (without `image` and `image_id`), and a sentence for each other row."""
    path = None
    try:
        path = source.path_of(item)
        annotated = source.annotate(item)
    except ValueError as error:
        return path, [], [str(error)]
    try:
        stored_size = None if path is None else measure_image(path, source.exif_oriented)
    except ValueError as error:
        # The file may be a copy in the cache, so the error also names the row that the user knows.
        where = f"{annotated.rows[0]['where']}: " if annotated.rows else ""
        return path, [], [f"{where}{error}"]
    return path, *place_rows(annotated, stored_size)


def _handle_problems(problems: list[str], errors: str) -> None:
    """Raises the first problem, or logs them and goes on."""
    if problems and errors == "raise":
        more = f" ({len(problems) - 1:,} more such problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    for problem in problems[:MAX_REPORTED]:
        logger.warning(f"left out: {problem}")
    if len(problems) > MAX_REPORTED:
        logger.warning(f"left out: {len(problems) - MAX_REPORTED:,} more, {len(problems):,} in all")


def _report_once(problems: list[str], reported: set[str]) -> None:
    """
    Logs the problems of a stream as they come up. Each is logged only once, because a stream may be read for many
    epochs, and no more than `MAX_REPORTED`, because their number is not known before the end.
    """
    for problem in problems:
        if problem not in reported and len(reported) <= MAX_REPORTED:
            reported.add(problem)
            more = len(reported) > MAX_REPORTED
            logger.warning("left out: more, not reported while streaming" if more else f"left out: {problem}")
