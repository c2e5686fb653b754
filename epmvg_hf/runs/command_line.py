"""The command line of a training: a file of arguments, then flags. And what every training does with them first."""

import difflib
import json
import logging
import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..training.checkpoint_files import find_checkpoint
from ..training.hardware import ComputeChoice, choose_compute, choose_threads
from ..utils import in_short

logger = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")

# The arguments that name something to read. In a file, they may be paths that start in the folder of that file.
INPUTS = (
    "config_name",
    "confirmed_model",
    "data_dir",
    "image_dir",
    "model_name_or_path",
    "teacher_name",
    "teacher_pretrained",
    "text_name_or_path",
    "tokenizer_name",
    "vision_name_or_path",
)
FOLDER_OF_A_TEACHER = "local-dir:"


class Loader(yaml.SafeLoader):
    """Reads YAML as its version 1.2 does: `no` is a word, such as for `eval_strategy`, and only `false` is false."""


BOOL = "tag:yaml.org,2002:bool"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class ArgumentParser(HfArgumentParser):
    """A parser whose errors are one line. Those of `argparse` begin with a list of all 200 arguments."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


def parse_arguments(
    types: tuple[type, ...], description: str, arguments: list[str], program: str | None = None
) -> tuple:
    """
    Parse a command line that begins with a YAML or JSON file of arguments, which flags override.

    The key `base` of the file may name another in the same folder, which gives what the first leaves out. A path to
    something that is read may start in the folder of the file, or else in the working directory. Where neither file
    nor flags say `bf16` or `fp16`, and `accelerate launch` was given no mixed precision, the hardware decides.

    Args:
        types (`tuple[type, ...]`): dataclasses whose fields are the arguments.
        description (`str`): text for `--help`.
        arguments (`list[str]`): the command line.
        program (`str`, *optional*): what the help and errors call the command; by default the name of the script.

    Returns:
        `tuple`: one instance of each of the `types`.

    Raises:
        ValueError: the command line begins with no file, or a file is none of arguments or names an unknown one.
        FileNotFoundError: there is no such file.
        SystemExit: a flag is unknown or has no valid value, or help was asked for.
    """
    parser = ArgumentParser(
        types,
        prog=program,
        description=description,
        usage="%(prog)s FILE [--NAME VALUE ...]",
        formatter_class=RawDescriptionHelpFormatter,
    )
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    if not arguments or not arguments[0].endswith(SUFFIXES):
        raise ValueError(f"expected a file of arguments ({', '.join(SUFFIXES)}) before all flags")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    names = sorted(actions)
    file, flags = Path(arguments[0]), arguments[1:]
    # On a machine without an accelerator, transformers accepts bf16 only together with use_cpu.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available(), bf16=None, fp16=None)
    values = read_file(file, names)
    parser.set_defaults(**{name: _as_default(file, actions[name], value) for name, value in values.items()})
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}{_suggestion(unknown[0].lstrip('-'), names, '--')}")
    bf16 = given.bf16
    if given.bf16 is None and given.fp16 is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no":
        bf16 = hardware_choice(given.use_cpu).precision == "bf16"
    parser.set_defaults(bf16=bool(bf16), fp16=bool(given.fp16))
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def read_file(file: Path, names: list[str], read: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The arguments in a file and in its base, whose keys must be among `names`. Paths are found from here. The files
    that were `read` on the way to this one may not be its base.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        values = json.loads(file.read_text()) if file.suffix == ".json" else yaml.load(file.read_text(), Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{file}: expected arguments as NAME: VALUE, one in a line")
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or not base or file.parent / base in (file, *read)):
        raise ValueError(f"{file}: base is {base!r}, expected the name of another file, which has no base in a circle")
    for name in values:
        if name not in names:
            raise ValueError(f"{file}: unknown argument {name}{_suggestion(name, names, '')} (--help lists all)")
    found = {name: _from_folder(values[name], file.parent) for name in INPUTS if isinstance(values.get(name), str)}
    return (read_file(file.parent / base, names, (*read, file)) if base is not None else {}) | values | found


def _as_default(file: Path, action: Action, value: Any) -> Any:
    """A value of a file in the form in which `argparse` checks its type, which is text."""
    if isinstance(value, list) and action.nargs not in ("+", "*"):
        raise ValueError(f"{file}: {action.dest} is a list, expected one value")
    if value is None and action.default is not None:
        raise ValueError(f"{file}: {action.dest} has no value")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _from_folder(name: str, folder: Path) -> str:
    """The path of what is called `name` in a folder, if it is there; otherwise the name as it is."""
    kind = FOLDER_OF_A_TEACHER if name.startswith(FOLDER_OF_A_TEACHER) else ""
    path = folder / name.removeprefix(kind)
    return f"{kind}{os.path.relpath(path)}" if path.exists() else name


def _suggestion(name: str, names: list[str], prefix: str) -> str:
    similar = difflib.get_close_matches(name, names, 1)
    return f", did you mean {prefix}{similar[0]}?" if similar else ""


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends a script with one line for an error that its user can mend."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {in_short(error)}") from error


def show_own_messages() -> None:
    """
    Shows what the package logs, and of other libraries the warnings only: open_clip logs ten lines to the root logger
    for each teacher.
    """
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("epmvg_hf").setLevel(logging.INFO)


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
