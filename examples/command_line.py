"""What the training examples' command lines have in common."""

import os
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def parse_arguments(types: tuple[type, ...], description: str, default_file: Path, arguments: list[str]) -> tuple:
    """
    Defaults come from one YAML or JSON file, the first argument if it is one, and from the file beside it that its key
    `base` names, where it leaves something out; flags override both.
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
        raise ValueError(f"{file}: unknown argument(s) {', '.join(unknown)}; --help lists them all")
    # transformers takes bf16 on a machine without accelerator only if it is told that the CPU is meant.
    parser.set_defaults(**{"use_cpu": not torch.accelerator.is_available(), **defaults})
    return parser.parse_args_into_dataclasses(arguments)


def use_all_cores(arguments: TrainingArguments) -> None:
    """On a CPU, share its cores among the local processes: `accelerate launch` gives each of them one thread."""
    if arguments.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_processes))


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """`--resume_from_checkpoint` takes a folder, or "true" for the last checkpoint in `--output_dir`."""
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint in ("true", "True"):
        folder = Path(arguments.output_dir)
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is None:
            raise ValueError(f"there is no checkpoint in {folder} to resume from")
    return checkpoint


def config_file(name: str, folder: Path) -> Path:
    """A file of the user's, or one of this folder's by its name."""
    file = Path(name)
    return file if file.exists() else folder / file
