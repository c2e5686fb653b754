"""What is in the files of a benchmark, beside what should be."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from .benchmarks import Benchmark, Counts, Wanted
from .builder import read_image
from .loading import find_source, source_kinds
from .readers.source import GroundingSource

COCO_BENCHMARKS = ("refcoco", "refcoco+", "refcocog")


@dataclass
class SplitReport:
    """
    What one split has.

    Args:
        split (`str`): full name of the split.
        official ([`Counts`] or `None`): what it should have, if that is published.
        files (`str`): the kind of files that were read.
        expressions (`int`): usable rows.
        references (`int` or `None`): distinct references among them, where the files number them.
        image_ids (`set[str]`): images with usable rows.
        missing_images (`int`): images of the split that are not there.
        problems (`list[str]`): a sentence for each row or image that cannot be used.
    """

    split: str
    official: Counts | None
    files: str = ""
    expressions: int = 0
    references: int | None = None
    image_ids: set[str] = field(default_factory=set)
    missing_images: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_official(self) -> bool:
        """Whether the numbers are the official ones, as far as those are known."""
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
) -> tuple[list[SplitReport], list[str]]:
    """
    Reads all annotations and the header of every image.

    Args:
        benchmark ([`Benchmark`]): the benchmark, see [`~benchmarks.resolve_name`].
        data_dir, split_by, image_dir, source: as in [`load_grounding_dataset`].

    Returns:
        `tuple`: A report for each split whose files are there, and why the others could not be read.

    Raises:
        `ValueError`: The benchmark has no such way to split it or kind of files.

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
    reports, absent = [], []
    for split in splits_of(benchmark, split_by):
        wanted = Wanted.check(benchmark, data_dir, split, split_by, image_dir)
        try:
            found = find_source(wanted, source)
            report = check_source(found, benchmark.counts.get((wanted.split_by, wanted.split)))
        except FileNotFoundError as error:
            absent.append(str(error))
            continue
        report.files = next(kind for kind, cls in source_kinds(benchmark).items() if type(found) is cls)
        reports.append(report)
    return reports, absent


def splits_of(benchmark: Benchmark, split_by: str | None) -> tuple[str, ...]:
    """The splits of one way to split it, or of the first."""
    return benchmark.splits[Wanted.check(benchmark, Path(), "train", split_by).split_by]


def check_source(source: GroundingSource, official: Counts | None) -> SplitReport:
    """The report of one split."""
    report = SplitReport(source.split, official)
    try:
        items, report.problems = source.list_images()
    except ValueError as error:  # a file that cannot be read at all
        report.problems = [str(error)]
        return report
    references: set[str | None] = set()
    for item in items:
        path, rows, problems = read_image(source, item)
        report.missing_images += path is None
        report.problems += problems
        report.expressions += len(rows)
        if rows:
            report.image_ids.add(source.image_id_of(item))
        # An object is referred to once in a benchmark, so where references have no ids those of objects will do.
        references.update(row.get("ref_id") or row.get("ann_id") for row in rows)
    report.references = len(references - {None}) or None
    return report


def overlaps(reports: list[SplitReport]) -> Iterator[tuple[str, str, int]]:
    """Pairs of splits with images in common, and how many."""
    for one, other in combinations(reports, 2):
        if common := len(one.image_ids & other.image_ids):
            yield one.split, other.split, common


def held_out_images(benchmark: Benchmark, data_dir: Path, split_by: str | None = None) -> dict[str, set[str]]:
    """
    The ids of the images in each split but "train" that is in the folder; for COCO's benchmarks those of train2014.

    Args:
        benchmark ([`Benchmark`]): the benchmark, see [`~benchmarks.resolve_name`].
        data_dir, split_by: as in [`load_grounding_dataset`].

    Returns:
        `dict[str, set[str]]`: ids by split.

    Raises:
        `FileNotFoundError`: The folder has none of these splits.

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
    for split in splits_of(benchmark, split_by):
        if not split.startswith("train"):
            try:
                source = find_source(Wanted.check(benchmark, data_dir, split, split_by))
                items, _ = source.list_images()
            except (FileNotFoundError, ValueError):
                continue
            held_out[split] = {source.image_id_of(item) for item in items}
    return held_out
