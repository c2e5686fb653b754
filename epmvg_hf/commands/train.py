"""`epmvg train`: a training from a file of arguments, on all accelerators of the machine."""

from pathlib import Path
from typing import Annotated

import typer

import epmvg_hf

from ..utils import needs_extra
from .grounder import check_model
from .launcher import launch


def train(
    context: typer.Context,
    num_processes: Annotated[
        int | None, typer.Option("--num_processes", help="[default: one for each accelerator of this machine]", min=1)
    ] = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option(
            "--accelerate_config",
            help="What `accelerate config` wrote, such as for several machines.",
            dir_okay=False,
            exists=True,
        ),
    ] = None,
    help_all: Annotated[
        bool, typer.Option("--help_all", help="Show all arguments that FILE and flags may have.")
    ] = False,
) -> None:
    """
    Train a model with the arguments in FILE (YAML or JSON), which flags override.

    The recipes in examples/configs are such files. A path in a file may start in the folder of the file.

    \b
        epmvg train examples/configs/shapes.yaml
        epmvg train examples/configs/custom.yaml --data_dir my_data
        epmvg train my.yaml --learning_rate 3e-4 --num_processes 2
        epmvg train my.yaml --resume_from_checkpoint true
    """
    with needs_extra("epmvg train", "train"):
        epmvg_hf.register()
        from ..runs.training_run import parse, run_training
    arguments = parse(["--help"] if help_all else context.args)
    # Mistakes are found before data is prepared, and said once, not by each process.
    model = arguments[0].model_name_or_path
    if model is not None:
        check_model(model)
    launch(context, num_processes, accelerate_config)
    run_training(*arguments)
