"""The command `epmvg`: check the files of a benchmark, and list the images that must not be trained on."""

from pathlib import Path
from typing import Annotated

from .data.benchmarks import BENCHMARKS, Benchmark, resolve_name
from .utils import needs_extra

with needs_extra("The command epmvg", "train"):
    import typer

    from .data.check_data import COCO_BENCHMARKS, SplitReport, check_splits, held_out_images, overlaps

MAX_SHOWN = 10

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
DataDir = Annotated[Path, typer.Argument(help="Folder with the files.", exists=True, file_okay=False)]


@app.command()
def check_data(
    name: Annotated[str, typer.Argument(help="The benchmark, such as refcoco, gref_umd or flickr30k_entities.")],
    data_dir: DataDir,
    split_by: Annotated[str | None, typer.Option(help="Which published way to split it, such as umd.")] = None,
    image_dir: Annotated[Path | None, typer.Option(help="Folder with the images.", exists=True)] = None,
    source: Annotated[str | None, typer.Option(help="Which files to read: refer, index, parquet or official.")] = None,
) -> None:
    """
    Compare the files of a benchmark in a folder with the official counts. The exit status is 1 if any split differs
    from them or if the folder has no split.
    """
    try:
        benchmark, implied = resolve_name(name)
        reports, absent = check_splits(benchmark, data_dir.resolve(), split_by or implied, image_dir, source)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    for reason in absent:
        typer.echo(f"not here: {reason}")
    typer.echo(_table(benchmark, reports))
    for report in reports:
        for problem in report.problems[:MAX_SHOWN]:
            typer.echo(f"{report.split}: {problem}")
        if len(report.problems) > MAX_SHOWN:
            typer.echo(f"{report.split}: {len(report.problems) - MAX_SHOWN:,} more problems")
    for one, other, images in overlaps(reports):
        typer.echo(f"{one} and {other} have {images:,} images in common")
    if not reports or not all(report.is_official for report in reports):
        raise typer.Exit(1)


def _table(benchmark: Benchmark, reports: list[SplitReport]) -> str:
    """A Markdown table in which the official count, if there is one, follows each count."""
    lines = [
        f"{benchmark.title}: found (official)",
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


@app.command()
def exclude_images(
    data_dir: DataDir,
    output: Annotated[Path | None, typer.Option(help="File to write the ids to, instead of printing them.")] = None,
) -> None:
    """
    List the COCO train2014 ids of every validation and test split of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO in a
    folder, one per line. A detector or CLIP that is trained without these images has not seen what the benchmarks
    test.
    """
    ids: set[str] = set()
    for name in COCO_BENCHMARKS:
        for split_by in BENCHMARKS[name].splits:
            try:
                held_out = held_out_images(BENCHMARKS[name], data_dir.resolve(), split_by)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            for split, images in held_out.items():
                typer.echo(f"{name} ({split_by}) {split}: {len(images):,} images", err=True)
                ids |= images
    if not ids:
        typer.echo(f"no validation or test split of {', '.join(COCO_BENCHMARKS)} in {data_dir}", err=True)
        raise typer.Exit(1)
    lines = "\n".join(sorted(ids, key=int)) + "\n"
    if output is None:
        typer.echo(lines, nl=False)
    else:
        output.write_text(lines)
        typer.echo(f"wrote {len(ids):,} ids to {output}", err=True)
