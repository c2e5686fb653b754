"""Several processes for a command: one for each accelerator, or as many as the user asks for."""

import os
import sys
from pathlib import Path

import typer

import epmvg_hf


def launch(context: typer.Context, num_processes: int | None, accelerate_config: Path | None = None) -> None:
    """
    Starts a command in several processes. This process becomes their launcher, which passes signals on to them. It
    does nothing if one process is enough, or if this is already one of them.

    Args:
        context (`typer.Context`): the command, whose arguments are those that typer does not know.
        num_processes (`int`, *optional*): how many; by default one for each accelerator of this machine.
        accelerate_config (`Path`, *optional*): what `accelerate config` wrote, such as for several machines.
    """
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return  # `torchrun` or `accelerate launch` started this process
    launcher = _launcher(num_processes, accelerate_config)
    if not launcher:
        return
    if Path(epmvg_hf.__file__).parents[1] != Path.cwd():
        # Otherwise a file of the user such as datasets.py would be taken for the library of that name.
        os.environ["PYTHONSAFEPATH"] = "1"
    debug = ["--debug"] if context.find_root().params["debug"] else []
    command = ["-m", *launcher, "-m", "epmvg_hf", *debug, str(context.info_name), *context.args]
    os.execv(sys.executable, [sys.executable, *command])


def _launcher(num_processes: int | None, accelerate_config: Path | None) -> list[str]:
    """The module that starts the processes, with its arguments; nothing for one process."""
    if accelerate_config is not None:
        count = [] if num_processes is None else ["--num_processes", str(num_processes)]
        return ["accelerate.commands.launch", "--quiet", "--config_file", str(accelerate_config), *count]
    if num_processes is None:
        import torch

        num_processes = torch.accelerator.device_count()
    if num_processes <= 1:
        return []
    return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
