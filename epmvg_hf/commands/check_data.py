"""`epmvg check-data`: what is in the files of a benchmark, or in your own, before a training meets it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils import needs_extra

if TYPE_CHECKING:
    from ..data.check_data import SplitReport

MAX_SHOWN = 10


def check_data(
    name: Annotated[
        str, typer.Argument(help="The benchmark, such as refcoco, gref_umd or flickr30k_entities, or custom.")
    ],
    data_dir: Annotated[Path, typer.Argument(help="Folder with the files.", exists=True, file_okay=False)],
    split: Annotated[list[str] | None, typer.Option(help="A split to check; by default each must be there.")] = None,
    split_by: Annotated[str | None, typer.Option(help="Which published way to split it, such as umd.")] = None,
    image_dir: Annotated[Path | None, typer.Option(help="Folder with the images.", exists=True)] = None,
    source: Annotated[str | None, typer.Option(help="Which files to read: refer, index, parquet or official.")] = None,
    box_format: Annotated[str | None, typer.Option(help="xyxy or xywh, for custom.")] = None,
    without_images: Annotated[bool, typer.Option(help="Images may be missing.")] = False,
) -> None:
    """
    Check the files in a folder: each row, the header of each image, and the official counts of a benchmark.

    The exit status is 1 if a split or an image is missing, a row cannot be used, or a count is not the official one.

    \b
        epmvg check-data refcoco refer/data --split testA --split testB
        epmvg check-data custom my_data --box-format xyxy
    """
    with needs_extra("epmvg check-data", "train"):
        from ..data.benchmarks import resolve_name
        from ..data.check_data import check_own_data, check_splits, overlaps

    folder = data_dir.resolve()
    try:
        if name == "custom":
            title = str(data_dir)
            reports, absent = check_own_data(folder, split, image_dir, box_format)
        else:
            benchmark, implied = resolve_name(name)
            title = f"{benchmark.title}: found (official)"
            reports, absent = check_splits(benchmark, folder, split_by or implied, image_dir, source, split)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for reason in absent:
        typer.echo(f"not here: {reason}")
    typer.echo(_table(title, reports))
    for report in reports:
        _echo_problems(report)
    for one, other, images in overlaps(reports):
        typer.echo(f"{one} and {other} have {images:,} images in common")
    complete = not absent and (without_images or not any(report.missing_images for report in reports))
    if not reports or not complete or not all(report.is_official for report in reports):
        raise typer.Exit(1)


def _table(title: str, reports: "list[SplitReport]") -> str:
    """A Markdown table in which the official count, if there is one, follows each count."""
    lines = [
        title,
        "",
        "| split | files | expressions | references | images | missing images | unusable | official |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        official = report.official
        expressions, references, images = (
            (None, None, None) if official is None else (official.expressions, official.references, official.images)
        )
        counts = [
            _with_official(report.expressions, expressions),
            _with_official(report.references, references),
            _with_official(len(report.image_ids), images),
            f"{report.missing_images:,}",
            f"{len(report.problems):,}",
            "unknown" if official is None else "yes" if report.is_official else "NO",
        ]
        lines.append(f"| {report.split} | {report.source} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _with_official(count: int | None, official: int | None) -> str:
    shown = "-" if count is None else f"{count:,}"
    return shown if official is None else f"{shown} ({official:,})"


def _echo_problems(report: "SplitReport") -> None:
    for problem in report.problems[:MAX_SHOWN]:
        typer.echo(f"{report.split}: {problem}")
    if len(report.problems) > MAX_SHOWN:
        typer.echo(f"{report.split}: {len(report.problems) - MAX_SHOWN:,} more problems")
