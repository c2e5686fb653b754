"""What the command lines of the training scripts have in common."""

import os
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def parse_arguments(types: tuple[type, ...], description: str, default_file: Path, arguments: list[str]) -> tuple:
    """
    Parse a command line whose defaults come from a YAML or JSON file.

    That file is the first argument, if the first argument is such a file, or else `default_file`. Its key `base` may
    name a file in the same folder, which gives the defaults that it leaves out. Flags override both files.

    Args:
        types (`tuple[type, ...]`): dataclasses whose fields are the arguments.
        description (`str`): text for `--help`.
        default_file (`Path`): the file for a command line that begins with none.
        arguments (`list[str]`): the command line.

    Returns:
        `tuple`: one instance of each of the `types`.

    Raises:
        ValueError: a file names an argument that does not exist.
    """
    file = default_file
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        file, arguments = Path(arguments[0]), arguments[1:]
    defaults = yaml.safe_load(file.read_text())  # JSON is YAML
    if "base" in defaults:
        defaults = yaml.safe_load((file.parent / defaults.pop("base")).read_text()) | defaults
    parser = HfArgumentParser(types, description=description)
    unknown = sorted(set(defaults) - {action.dest for action in parser._actions})
    if unknown:
        raise ValueError(f"{file}: unknown argument(s) {', '.join(unknown)}; --help lists all that exist")
    # On a machine without an accelerator, transformers accepts bf16 only together with use_cpu.
    parser.set_defaults(**{"use_cpu": not torch.accelerator.is_available(), **defaults})
    return parser.parse_args_into_dataclasses(arguments)


def use_all_cores(arguments: TrainingArguments) -> None:
    """Share a CPU's cores among the local processes, because `accelerate launch` gives each of them one thread."""
    if arguments.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint` means, which with "true" is the last checkpoint in `--output_dir`."""
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint in ("true", "True"):
        folder = Path(arguments.output_dir)
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint in {folder} to resume from")
    return checkpoint


def config_file(name: str, folder: Path) -> Path:
    """The file of this name, or else the one in `folder`."""
    file = Path(name)
    return file if file.exists() else folder / file
