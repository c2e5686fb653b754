"""One `datasets` builder for every annotation format: rows of image, expression and box, checked as they are made."""

import hashlib
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from .annotations import place_rows
from .files.image_files import measure_image
from .readers.source import GroundingSource

logger = logging.getLogger(__name__)

LEFT_OUT = "left-out-{}.json"  # beside the rows that a process prepares
ROWS_AT_ONCE = 1_000  # in memory, and in one piece of a table
MAX_REPORTED = 20  # of the problems that errors="skip" passes over; the others are counted


def open_source(
    source: GroundingSource,
    missing_images: str = "error",
    errors: str = "raise",
    exclude: frozenset[str] = frozenset(),
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a source; see [`load_grounding_dataset`] for the arguments."""
    builder = GroundingBuilder(
        dataset_name=source.name,  # names the cache folder
        hash=source.fingerprint(),
        cache_dir=cache_dir,
        source=source,
        missing_images=missing_images,
        errors=errors,
        exclude=exclude,
    )
    if streaming:
        return builder.as_streaming_dataset(split=source.split)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split=source.split)


@dataclass(kw_only=True)
class GroundingConfig(datasets.BuilderConfig):
    """What to make rows from, and how to treat what cannot be used; see [`load_grounding_dataset`]."""

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
        # Names a folder in the cache; the hash that the builder is given tells files apart.
        parts = [self.source.split, self.missing_images, self.errors]
        if self.exclude:
            parts.append(hashlib.sha256("\n".join(sorted(self.exclude)).encode()).hexdigest()[:16])
        return "-".join(parts)


class GroundingBuilder(datasets.ArrowBasedBuilder):
    """Prepares the one split that its source has. [`open_source`] adds the hash that keeps the cache true."""

    VERSION = datasets.Version("2.0.0")  # raise it when the rows made from the same files change
    BUILDER_CONFIG_CLASS = GroundingConfig

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
        found, misnamed = find_images(source, items)
        handle_problems(problems + misnamed, config.errors)
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
        # `datasets` shares out this list among processes and, when streaming, goes through it element by element.
        arguments = {"items": usable, "source": source, "errors": config.errors, "reported": set()}
        return [datasets.SplitGenerator(source.split, arguments)]

    def _generate_tables(self, items: list, **options: Any) -> Iterator[tuple[int, pa.Table]]:
        """Rows as Arrow keeps them: `datasets` itself would look at each value of each row three times."""
        schema = self.info.features.arrow_schema
        rows = self._generate_examples(items, **options)
        number = 0
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            yield number, pa.Table.from_pylist(some, schema)
            number += 1

    def _generate_examples(
        self,
        items: list,
        source: GroundingSource,
        errors: str,
        reported: set[str],
        left_out: deque[str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """What is wrong goes to `left_out` while rows are prepared. When streaming, it is `reported` in passing."""
        for item in items:
            path, rows, problems = read_image(source, item)
            if problems and errors == "raise":
                raise ValueError(problems[0])
            if left_out is None:
                report_in_passing(problems, reported)
            else:
                left_out += problems
            image_id = source.image_id_of(item)
            image = None if path is None else {"bytes": None, "path": path}
            yield from ({**row, "image": image, "image_id": image_id} for row in rows)

    def _prepare_split(self, split_generator: datasets.SplitGenerator, **kwargs: Any) -> None:
        super()._prepare_split(split_generator, **kwargs)
        left_out: list[str] = []
        for path in sorted(Path(self._output_dir).glob(LEFT_OUT.format("*"))):
            left_out += json.loads(path.read_text())
            path.unlink()
        handle_problems(left_out, "skip")
        if not split_generator.split_info.num_examples:
            source = self.config.source
            raise ValueError(f"no row of the {source.split} split of {source.name} is left, expected at least one.")

    def _prepare_split_single(self, gen_kwargs: dict, fpath: str, job_id: int, **kwargs: Any) -> Iterator:
        left_out: deque[str] = deque()  # `datasets` gives a copy of each list to the generator
        gen_kwargs = {**gen_kwargs, "left_out": left_out}
        try:
            yield from super()._prepare_split_single(gen_kwargs=gen_kwargs, fpath=fpath, job_id=job_id, **kwargs)
            # Through a file: this may be a worker process, where nobody may see what is logged.
            Path(fpath).with_name(LEFT_OUT.format(f"{job_id:05d}")).write_text(json.dumps(list(left_out)))
        except datasets.exceptions.DatasetGenerationError as error:
            # `datasets` hides our message behind its own, and loses it on the way out of a worker process.
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise


def find_images(source: GroundingSource, items: list[Any]) -> tuple[list[tuple[Any, str | None]], list[str]]:
    """Items with the image of each, `None` if it is not there, and what is wrong with the names of the others."""
    found, problems = [], []
    for item in items:
        try:
            found.append((item, source.path_of(item)))
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def read_image(source: GroundingSource, item: Any) -> tuple[str | None, list[dict[str, Any]], list[str]]:
    """Path, usable rows (without `image` and `image_id`) and what is wrong with the others."""
    path = None
    try:
        path = source.path_of(item)
        annotated = source.annotate(item)
        stored_size = None if path is None else measure_image(path, source.turned)
    except ValueError as error:
        return path, [], [str(error)]
    return path, *place_rows(annotated, stored_size)


def handle_problems(problems: list[str], errors: str) -> None:
    """Raises the first, or reports them all and goes on."""
    if problems and errors == "raise":
        more = f" ({len(problems) - 1:,} more such problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    for problem in problems[:MAX_REPORTED]:
        logger.warning(f"left out: {problem}")
    if len(problems) > MAX_REPORTED:
        logger.warning(f"left out: {len(problems) - MAX_REPORTED:,} more, {len(problems):,} in all")


def report_in_passing(problems: list[str], reported: set[str]) -> None:
    """Reports each problem once, up to `MAX_REPORTED`: nobody knows how many there will be, or how many epochs."""
    for problem in problems:
        if problem not in reported and len(reported) <= MAX_REPORTED:
            reported.add(problem)
            more = len(reported) > MAX_REPORTED
            logger.warning("left out: more, not reported while streaming" if more else f"left out: {problem}")
