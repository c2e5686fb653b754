"""Compares what is in the files of a benchmark with what should be in them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from .benchmarks import Benchmark, Counts, SplitRequest
from .builder import read_image
from .loading import find_reader, readers_of
from .readers.custom import SUFFIXES, CustomData
from .readers.source import GroundingSource

COCO_BENCHMARKS = ("refcoco", "refcoco+", "refcocog", "grefcoco")


@dataclass
class SplitReport:
    """
    What was found of one split.

    Args:
        split (`str`): full name of the split.
        official ([`Counts`] or `None`): the published numbers, if there are any.
        source (`str`): which kind of files was read, as [`load_grounding_dataset`] calls it.
        expressions (`int`): how many rows can be used.
        references (`int` or `None`): how many different references they belong to, where the files number them.
        image_ids (`set[str]`): the images that they belong to.
        missing_images (`int`): how many images of the split have no file.
        problems (`list[str]`): a sentence for each row or image that cannot be used.
    """

    split: str
    official: Counts | None
    source: str = ""
    expressions: int = 0
    references: int | None = None
    image_ids: set[str] = field(default_factory=set)
    missing_images: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_official(self) -> bool:
        """Whether all published numbers were found; if there are none, whether every row can be used."""
        if self.official is None:
            return not self.problems
        found = (self.expressions, self.references, len(self.image_ids))
        expected = (self.official.expressions, self.official.references, self.official.images)
        return all(e is None or f is None or e == f for f, e in zip(found, expected, strict=True))


def check_splits(
    benchmark: Benchmark,
    data_dir: Path,
    split_by: str | None = None,
    image_dir: Path | None = None,
    source: str | None = None,
    splits: Sequence[str] | None = None,
) -> tuple[list[SplitReport], list[str]]:
    """
    Reads all annotations and the header of every image, and counts what is in each split.

    Args:
        benchmark ([`Benchmark`]): the benchmark, see [`~benchmarks.resolve_name`].
        data_dir, split_by, image_dir, source: as in [`load_grounding_dataset`].
        splits (`Sequence[str]`, *optional*): the names of the splits; all by default.

    Returns:
        `tuple[list[SplitReport], list[str]]`: A report for each split whose files are there, and for each of the
        others a sentence that says which files were looked for.

    Raises:
        `ValueError`: The benchmark has no such way to split it, or does not come in such files.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from epmvg_hf.data.benchmarks import resolve_name
    >>> from epmvg_hf.data.check_data import check_splits

    >>> reports, absent = check_splits(resolve_name("refcoco")[0], Path("refer/data"))
    >>> [(report.split, report.is_official) for report in reports]  # of a folder with a few rows of each
    [('train', False), ('validation', False), ('testA', False), ('testB', False)]
    ```
    """
    kinds = {cls: kind for kind, cls in readers_of(benchmark).items()}

    def check(split: str) -> SplitReport:
        request = SplitRequest.resolve(benchmark, data_dir, split, split_by, image_dir)
        reader = find_reader(request, source)
        return _check_split(reader, kinds[type(reader)], benchmark.counts.get((request.split_by, request.split)))

    return _check_all(splits or _splits_of(benchmark, split_by), check)


def check_own_data(
    data_dir: Path, splits: Sequence[str] | None = None, image_dir: Path | None = None, box_format: str | None = None
) -> tuple[list[SplitReport], list[str]]:
    """
    Does the same for data of your own, see [`~custom.CustomData`].

    Args:
        data_dir, image_dir, box_format: as in [`load_grounding_dataset`].
        splits (`Sequence[str]`, *optional*): the names of the splits; by default those of all files in the folder.

    Returns:
        `tuple[list[SplitReport], list[str]]`: A report for each split, and a sentence for each that is not there.

    Raises:
        `ValueError`: There is no such `box_format`, or none where the files need one.
        `FileNotFoundError`: The folder has no file of rows.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from epmvg_hf.data.check_data import check_own_data

    >>> reports, absent = check_own_data(Path("my_data"), box_format="xyxy")
    >>> [(report.split, report.expressions, report.missing_images, report.problems) for report in reports]
    [('train', 2, 0, [])]
    ```
    """
    found = {path.stem for path in data_dir.iterdir() if path.suffix in SUFFIXES}
    if not splits and not found:
        raise FileNotFoundError(f"no file of rows ({', '.join(SUFFIXES)}) is in {data_dir}.")
    return _check_all(
        splits or sorted(found),
        lambda split: _check_split(CustomData(data_dir, split, image_dir, box_format), "custom", None),
    )


def _check_all(splits: Iterable[str], check: Callable[[str], SplitReport]) -> tuple[list[SplitReport], list[str]]:
    """The report of each split whose files are there, and the errors of the others."""
    reports, absent = [], []
    for split in splits:
        try:
            reports.append(check(split))
        except FileNotFoundError as error:
            absent.append(str(error))
    return reports, absent


def _splits_of(benchmark: Benchmark, split_by: str | None) -> tuple[str, ...]:
    return benchmark.splits[SplitRequest.resolve(benchmark, Path(), "train", split_by).split_by]


def _check_split(reader: GroundingSource, kind: str, official: Counts | None) -> SplitReport:
    report = SplitReport(reader.split, official, kind)
    try:
        items, report.problems = reader.list_images()
    except ValueError as error:  # none of the rows can be read
        report.problems = [str(error)]
        return report
    references: set[str | None] = set()
    for item in items:
        path, rows, problems = read_image(reader, item)
        report.missing_images += path is None
        report.problems += problems
        report.expressions += len(rows)
        if rows:
            report.image_ids.add(reader.image_id_of(item))
        # A benchmark refers to an object only once, so the ids of objects stand in where references have none.
        references.update(row.get("ref_id") or row.get("ann_id") for row in rows)
    report.references = len(references - {None}) or None
    return report


def overlaps(reports: list[SplitReport]) -> Iterator[tuple[str, str, int]]:
    """The pairs of splits that have images in common, and how many images that are."""
    for one, other in combinations(reports, 2):
        if common := len(one.image_ids & other.image_ids):
            yield one.split, other.split, common


def held_out_images(benchmark: Benchmark, data_dir: Path, split_by: str | None = None) -> dict[str, set[str]]:
    """
    The ids of the images in each split other than "train", as far as the folder has them. For the benchmarks
    in `COCO_BENCHMARKS` they are ids of COCO train2014.

    Args:
        benchmark ([`Benchmark`]): the benchmark, see [`~benchmarks.resolve_name`].
        data_dir, split_by: as in [`load_grounding_dataset`].

    Returns:
        `dict[str, set[str]]`: The ids for each split whose files are there.

    Raises:
        `ValueError`: A file cannot be read. Leaving out its split without a word would let its images be trained on.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from epmvg_hf.data.benchmarks import resolve_name
    >>> from epmvg_hf.data.check_data import held_out_images

    >>> list(held_out_images(resolve_name("refcoco")[0], Path("refer/data")))
    ['validation', 'testA', 'testB']
    ```
    """
    held_out = {}
    for split in _splits_of(benchmark, split_by):
        if not split.startswith("train"):
            try:
                reader = find_reader(SplitRequest.resolve(benchmark, data_dir, split, split_by))
                items, _ = reader.list_images()
            except FileNotFoundError:
                continue
            held_out[split] = {reader.image_id_of(item) for item in items}
    return held_out
