"""`epmvg export`: a model as programs that run without this package."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import epmvg_hf

from .grounder import check_model


class Format(StrEnum):
    """The kinds of programs."""

    onnx = "onnx"
    torch = "torch"


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    output: Annotated[Path, typer.Argument(help="Folder for the two programs.", file_okay=False)],
    output_format: Annotated[
        Format, typer.Option("--format", help="ONNX, or a program of torch.export.")
    ] = Format.onnx,
) -> None:
    """
    Export a model as two programs: one encodes an image, the other grounds expressions in it.

    They take any number of images, expressions and tokens, on the canvas of the processor, which is saved beside them.
    They are run with several numbers, and their boxes compared with the model's.

    \b
        epmvg export outputs/demo outputs/onnx                   # image.onnx and expression.onnx
        epmvg export outputs/demo outputs/pt2 --format torch     # image.pt2 and expression.pt2
    """
    check_model(model)
    epmvg_hf.register()
    from ..model.processing_epmvg import EpmVGProcessor
    from .exported_programs import compare, export_halves

    export_halves(model, output_format).save_pretrained(output)
    EpmVGProcessor.from_pretrained(model).save_pretrained(output)
    for line in compare(model, output):
        typer.echo(line)
