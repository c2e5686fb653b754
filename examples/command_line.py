"""The parts that the command lines of the training scripts share."""

import logging
import os
from functools import cache
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from epmvg_hf.training.checkpoint_files import find_checkpoint
from epmvg_hf.training.hardware import ComputeChoice, choose_compute, choose_threads

logger = logging.getLogger("command_line")


def parse_arguments(types: tuple[type, ...], description: str, default_file: Path, arguments: list[str]) -> tuple:
    """
    Parse a command line whose defaults come from a YAML or JSON file.

    That file is the first argument, if the first argument is such a file, or else `default_file`. Its key `base` may
    name a file in the same folder, which gives the defaults that it leaves out. Flags override both files. Where
    neither says `bf16` or `fp16`, and `accelerate launch` was given no mixed precision, the hardware decides.

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
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), bf16=None, fp16=None)
    parser.set_defaults(**defaults)
    given = parser.parse_known_args(arguments)[0]
    bf16 = given.bf16
    if given.bf16 is None and given.fp16 is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        bf16 = hardware_choice(given.use_cpu).precision == "bf16"
    parser.set_defaults(bf16=bool(bf16), fp16=bool(given.fp16))
    return parser.parse_args_into_dataclasses(arguments)


def show_own_messages(script: str) -> None:
    """
    Shows what a script and the package log, and of other libraries the warnings only: open_clip logs ten lines to the
    root logger for each teacher.
    """
    logging.basicConfig(level=logging.WARNING)
    for name in (script, logger.name, "epmvg_hf"):
        logging.getLogger(name).setLevel(logging.INFO)


@cache
def hardware_choice(use_cpu: bool) -> ComputeChoice:
    """What is fast on the device that a training will use; measured once."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not use_cpu else None
    return choose_compute(device or torch.device("cpu"))


def use_hardware(arguments: TrainingArguments) -> str | None:
    """
    Set the threads of a process on a CPU, and say in one line of the log how this machine computes and why.

    Returns:
        `str` or `None`: the attention implementation that is fast in the precision of `arguments`, `None` for what
        transformers chooses.
    """
    choice = hardware_choice(arguments.use_cpu)
    on_cpu = arguments.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(choose_threads())
    precision = {"bf16": "bfloat16", "fp16": "float16"}.get(arguments.mixed_precision, "float32")
    attention = choice.attn_implementation if arguments.mixed_precision == choice.precision else None
    threads = f", {torch.get_num_threads()} threads" if on_cpu else ""
    logger.info("computing in %s%s (%s)", precision, threads, choice.reason)
    return attention


def check_output_dir(arguments: TrainingArguments) -> None:
    """Refuses a folder in which checkpoints of two runs would lie side by side, and resuming would take either."""
    has_checkpoints = any(Path(arguments.output_dir).glob("checkpoint-*"))
    if arguments.do_train and has_checkpoints and not arguments.resume_from_checkpoint:
        raise ValueError(
            f"{arguments.output_dir} has checkpoints of an earlier run: go on with it (--resume_from_checkpoint "
            "true), delete them, or give another --output_dir"
        )


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint` means; "true" is the newest whole checkpoint in `--output_dir`."""
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint in ("true", "True"):
        checkpoint = str(find_checkpoint(arguments.output_dir))
    return checkpoint


def config_file(name: str, folder: Path) -> Path:
    """The file of this name, or else the one in `folder`."""
    file = Path(name)
    return file if file.exists() else folder / file
