"""The splits of an evaluation, which are all loaded before the model so that a mistake shows at once."""

import argparse
import logging
import re
from collections.abc import Container
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.benchmarks import resolve_name
from ..data.loading import load_grounding_dataset
from ..data.shapes import SPLITS as SHAPES_SPLITS
from ..training.training_args import EpmVGTrainingArguments
from .evaluation_arguments import NamedBenchmark

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedSplit:
    """
    A split to evaluate.

    Args:
        benchmark, split (`str`): the names that it was asked for by.
        folder (`str`, *optional*): where its files are.
        label (`str`): benchmark and split as a part of file names, different for each split of an evaluation.
        dataset (`datasets.Dataset`): its rows.
    """

    benchmark: str
    split: str
    folder: str | None
    label: str
    dataset: Dataset


def load_splits(arguments: argparse.Namespace, training_arguments: EpmVGTrainingArguments) -> list[EvaluatedSplit]:
    """
    Load all that is evaluated, in the order of the command line.

    Args:
        arguments (`argparse.Namespace`): what [`~evaluation_arguments.parse_arguments`] gives.
        training_arguments ([`EpmVGTrainingArguments`]): lets one process prepare the rows while the others wait.

    Raises:
        ValueError, FileNotFoundError: a name, a split, a folder or a row cannot be used, or no row of a split has a
            box.
    """
    splits: dict[str, EvaluatedSplit] = {}
    for benchmark in arguments.benchmarks:
        for split in benchmark.splits or arguments.splits or _test_splits(benchmark.name):
            with training_arguments.main_process_first(desc=f"preparing {benchmark.name} {split}"):
                dataset = _load(benchmark, split, arguments)
            label = _unused_label(f"{benchmark.name}_{split}", splits)
            splits[label] = EvaluatedSplit(benchmark.name, split, benchmark.folder, label, dataset)
    return [*splits.values()]


def _unused_label(label: str, used: Container[str]) -> str:
    """A label for file names. Two folders of custom data may have splits of the same name, so it may get a number."""
    label = re.sub(r"[^\w.+-]", "-", label)
    numbered = (f"{label}_{number}" for number in count(2))
    return next(candidate for candidate in chain([label], numbered) if candidate not in used)


def _test_splits(name: str) -> list[str]:
    """All splits of a benchmark except the training splits."""
    if name == "custom":
        raise ValueError("custom data has no splits of its own: name those to evaluate, as in custom:test=FOLDER")
    if name == "shapes":
        splits = tuple(SHAPES_SPLITS)
    else:
        benchmark, split_by = resolve_name(name)
        splits = benchmark.splits[split_by or next(iter(benchmark.splits))]
    return [split for split in splits if not split.startswith("train")]


def _load(benchmark: NamedBenchmark, split: str, arguments: argparse.Namespace) -> Dataset:
    """
    The rows of a split that have a box or are known to be absent, for Flickr30K Entities also with the column `boxes`
    that its second protocol needs.
    """
    name = benchmark.name
    options: dict[str, Any] = {"absent_per_image": arguments.absent_per_image}
    if name != "shapes":
        options |= {"missing_images": arguments.missing_images, "errors": arguments.errors}
    if name == "custom":
        options["box_format"] = arguments.box_format
    elif name != "shapes" and resolve_name(name)[0].name == "flickr30k_entities":
        options["boxes"] = "any"
    dataset = load_grounding_dataset(name, benchmark.folder, split, **options)
    with_box = [row for row, box in enumerate(dataset["box"]) if box is not None]
    absent = np.flatnonzero(dataset["absent"][:]).tolist() if "absent" in dataset.column_names else []
    if not with_box:
        raise ValueError(f"none of the {len(dataset)} expressions of {name} {split} has a box to compare with")
    if others := len(dataset) - len(with_box) - len(absent):
        logger.info("%s %s: %d expressions without a box are left out", name, split, others)
    if arguments.limit is not None:
        # Absent expressions may come after all others, so the limit does not count them.
        with_box = with_box[: arguments.limit]
        image_ids = dataset["image_id"][:]
        images = {image_ids[row] for row in with_box}
        absent = [row for row in absent if image_ids[row] in images]
    return dataset.select(sorted(with_box + absent))
