"""The arguments of an evaluation. Nothing heavy is imported here, so that `--help` is quick."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DESCRIPTION = """\
Evaluate a model on splits of benchmarks or of your own data: Acc@0.5 and more as one table.

  epmvg evaluate outputs/demo --benchmarks shapes
  epmvg evaluate MODEL --benchmarks refcoco:testA,testB=DIR gref_umd=DIR --report
  epmvg evaluate MODEL --benchmarks custom:test=my_data --box_format xyxy

A benchmark is NAME=FOLDER, or NAME:SPLIT,SPLIT=FOLDER. Without splits of its own it gets those of --splits, or else
all but the training splits. Custom data, your own files, has no splits that the command could know, so name them;
files other than COCO's JSON also need --box_format. `shapes` has no folder. Rows without a box are left out.

Written after each split, so that what is finished stays if a later split fails:
  evaluation.md, evaluation.json   the table, with the accuracy by kind of expression, number of boxes and size of box
  predictions_NAME_SPLIT.jsonl     all predicted boxes, those with the lowest IoU first, absent expressions at the end
  scores_NAME_SPLIT.png            what the scores are worth, of a model that has them
  errors_NAME_SPLIT.html           with --report: the worst errors of each kind with their pictures, as one file
"""


@dataclass(frozen=True)
class NamedBenchmark:
    """
    A benchmark that the command line names.

    Args:
        name (`str`): a name that [`load_grounding_dataset`] knows.
        splits (`tuple[str, ...]`): the splits that are named with it, or none.
        folder (`str`, *optional*): the folder with its files.
    """

    name: str
    splits: tuple[str, ...]
    folder: str | None


def read_benchmark(text: str) -> NamedBenchmark:
    """
    Read `NAME`, `NAME=FOLDER`, `NAME:SPLIT,SPLIT` or `NAME:SPLIT,SPLIT=FOLDER`. The first `=` ends the name and the
    splits, so the folder may have any signs.

    Raises:
        argparse.ArgumentTypeError: the name, a split or the folder is empty.
    """
    named, equals, folder = text.partition("=")
    name, colon, listed = named.partition(":")
    splits = tuple(split.strip() for split in listed.split(",")) if colon else ()
    if not name or not all(splits) or (equals and not folder):
        raise argparse.ArgumentTypeError(f"{text!r} is no benchmark, expected NAME=FOLDER or NAME:SPLIT,SPLIT=FOLDER")
    return NamedBenchmark(name, splits, folder or None)


def parse_arguments(command_line: list[str], program: str) -> argparse.Namespace:
    """
    Parse the command line of an evaluation.

    Args:
        command_line (`list[str]`): the arguments.
        program (`str`): what the help and errors call the command.

    Returns:
        `argparse.Namespace`: `model` (`str`), `benchmarks` (a list of [`NamedBenchmark`]), `output_dir`
        (`pathlib.Path`), and each further option under its name.

    Raises:
        SystemExit: an argument is unknown or has no valid value, or help was asked for.
    """
    parser = argparse.ArgumentParser(
        program,
        usage="%(prog)s MODEL --benchmarks NAME[:SPLIT,...][=FOLDER] ... [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a trained model.")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        required=True,
        type=read_benchmark,
        metavar="BENCHMARK",
        help="NAME=FOLDER or NAME:SPLIT,SPLIT=FOLDER for each benchmark, or shapes.",
    )
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="Splits of benchmarks that name none themselves.")
    parser.add_argument(
        "--missing_images", choices=["error", "skip"], default="error", help="What to do with rows without an image."
    )
    parser.add_argument(
        "--errors", choices=["raise", "skip"], default="raise", help="What to do with rows that cannot be used."
    )
    parser.add_argument(
        "--box_format",
        choices=["xyxy", "xywh"],
        help="Meaning of the four numbers of a box in custom data; needed unless that is COCO's JSON.",
    )
    parser.add_argument(
        "--limit",
        type=_at_least(1),
        metavar="N",
        help="Evaluate on the first N expressions with a box of each split, and on absent ones of their images.",
    )
    parser.add_argument(
        "--absent_per_image",
        type=_at_least(1),
        metavar="N",
        help="Add N expressions to each image whose things are not in it, for the AUROC of the scores.",
    )
    parser.add_argument(
        "--pictures",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="Draw N right and N wrong boxes of each split, chosen by a fixed seed.",
    )
    parser.add_argument("--report", action="store_true", help="Write a page with the worst errors of each split.")
    parser.add_argument("--batch_size", type=_at_least(1), default=16, metavar="N", help="Images in a batch. [16]")
    parser.add_argument(
        "--num_processes",
        type=_at_least(1),
        metavar="N",
        help="Processes, which share the images. [one for each accelerator of this machine]",
    )
    parser.add_argument("--bf16", action="store_true", help="Compute in bfloat16.")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("outputs/evaluation"),
        metavar="FOLDER",
        help="Folder for all files. [outputs/evaluation]",
    )
    return parser.parse_args(command_line)


def _at_least(least: int) -> Callable[[str], int]:
    """A type of `argparse`: whole numbers from `least` on."""

    def read(text: str) -> int:
        number = int(text) if text.lstrip("-").isdecimal() else None
        if number is None or number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return number

    return read
