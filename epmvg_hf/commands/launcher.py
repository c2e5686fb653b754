"""Several processes for a command: one for each accelerator, or as many as the user asks for."""

import os
import sys
from pathlib import Path

import epmvg_hf


def find_launcher(num_processes: int | None, accelerate_config: Path | None = None) -> list[str]:
    """
    What starts the processes of a command.

    Args:
        num_processes (`int`, *optional*): how many; by default one for each accelerator of this machine.
        accelerate_config (`Path`, *optional*): what `accelerate config` wrote, such as for several machines.

    Returns:
        `list[str]`: a module with its arguments, or nothing if one process is enough, or if this is one of several.
    """
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return []  # `torchrun` or `accelerate launch` started this process
    if accelerate_config is not None:
        count = [] if num_processes is None else ["--num_processes", str(num_processes)]
        return ["accelerate.commands.launch", "--quiet", "--config_file", str(accelerate_config), *count]
    if num_processes is None:
        import torch

        num_processes = torch.accelerator.device_count()
    if num_processes <= 1:
        return []
    return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]


def become(launcher: list[str], command: list[str]) -> None:
    """
    Starts a command in several processes. This process becomes their launcher, which passes signals on to them.

    Args:
        launcher (`list[str]`): what [`find_launcher`] gives.
        command (`list[str]`): what follows `epmvg`.
    """
    if Path(epmvg_hf.__file__).parents[1] != Path.cwd():
        # Otherwise a file of the user such as datasets.py would be taken for the library of that name.
        os.environ["PYTHONSAFEPATH"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", *launcher, "-m", "epmvg_hf", *command])
