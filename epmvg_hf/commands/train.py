"""`epmvg train`: a training from a file of arguments, on all accelerators of the machine."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import epmvg_hf

from ..utils import needs_extra


def train(
    context: typer.Context,
    num_processes: Annotated[
        int | None, typer.Option("--num_processes", help="[default: one for each accelerator of this machine]", min=1)
    ] = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option(
            "--accelerate_config", help="What `accelerate config` wrote, such as for several machines.", dir_okay=False
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
        epmvg train examples/configs/custom.yaml --data_dir my_data --model_name_or_path outputs/demo
        epmvg train my.yaml --learning_rate 3e-4 --num_processes 2
        epmvg train my.yaml --resume_from_checkpoint true
    """
    if not help_all and not _is_launched():
        launcher = _launcher(num_processes, accelerate_config)
        if launcher:
            assert context.parent is not None
            debug = ["--debug"] if context.parent.params["debug"] else []
            # This process becomes the launcher, which passes signals on to the processes of the training.
            command = [sys.executable, "-m", *launcher, "-m", "epmvg_hf", *debug, "train", *context.args]
            os.execv(sys.executable, command)
    with needs_extra("epmvg train", "train"):
        epmvg_hf.register()
        from ..runs.training_run import run_training
    run_training(["--help"] if help_all else context.args)


def _is_launched() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _launcher(num_processes: int | None, accelerate_config: Path | None) -> list[str]:
    """The module that starts several processes, with its arguments; nothing for one process."""
    if accelerate_config is not None:
        count = [] if num_processes is None else ["--num_processes", str(num_processes)]
        return ["accelerate.commands.launch", "--quiet", "--config_file", str(accelerate_config), *count]
    if num_processes is None:
        import torch

        num_processes = max(1, torch.accelerator.device_count())
    if num_processes == 1:
        return []
    return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
