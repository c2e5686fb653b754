"""`epmvg exclude-images`: the images that must not be trained on."""

from pathlib import Path
from typing import Annotated

import typer

from ..utils import needs_extra


def exclude_images(
    data_dir: Annotated[Path, typer.Argument(help="Folder with the files.", exists=True, file_okay=False)],
    output: Annotated[Path | None, typer.Option(help="File to write the ids to, instead of printing them.")] = None,
) -> None:
    """
    List the COCO train2014 ids of every validation and test split of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO in a
    folder, one per line. A detector or CLIP that is trained without these images has not seen what the benchmarks
    test.

    \b
        epmvg exclude-images refer/data --output held_out.txt
    """
    with needs_extra("epmvg exclude-images", "train"):
        from ..data.benchmarks import BENCHMARKS
        from ..data.check_data import COCO_BENCHMARKS, held_out_images

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
