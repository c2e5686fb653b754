"""An evaluation from the command line: a model on all splits that are asked for, and the files that it leaves."""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..evaluation.accuracy import evaluate_boxes, find_boxes, paired_iou
from ..evaluation.accuracy_by_group import accuracy_by_group, size_of_box
from ..evaluation.error_report import make_error_report
from ..evaluation.score_quality import draw_scores, evaluate_scores
from ..model.modeling_epmvg import EpmVGForVisualGrounding
from ..model.processing_epmvg import EpmVGProcessor
from ..training.trainer import EpmVGTrainer
from ..training.training_args import EpmVGTrainingArguments
from ..utils import in_short
from .command_line import show_own_messages
from .evaluated_splits import EvaluatedSplit, load_splits
from .evaluation_table import make_table
from .predictions import draw_rows, write_predictions, write_whole

logger = logging.getLogger(__name__)


def run_evaluation(arguments: argparse.Namespace) -> None:
    """
    Evaluates a model on splits of benchmarks, prints the results as a table, and writes them after each split.

    Args:
        arguments (`argparse.Namespace`): what [`~evaluation_arguments.parse_arguments`] gives.

    Raises:
        ValueError, OSError: data or model cannot be used, which is found before the evaluation begins, or a split
            cannot be evaluated. The message then says where the results of the splits before it are.
    """
    training_arguments = EpmVGTrainingArguments(
        str(arguments.output_dir),
        per_device_eval_batch_size=arguments.batch_size,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    if training_arguments.should_log:
        show_own_messages()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    splits = load_splits(arguments, training_arguments)
    trainer = EpmVGTrainer(
        EpmVGForVisualGrounding.from_pretrained(arguments.model),
        training_arguments,
        processing_class=EpmVGProcessor.from_pretrained(arguments.model),
    )
    results: list[dict[str, Any]] = []
    try:
        for split in splits:
            try:
                results.append(evaluate_split(trainer, split, arguments))
            except (
                OSError,
                RuntimeError,
                ValueError,
            ) as error:  # torch raises RuntimeError if memory does not suffice
                raise ValueError(_describe_failure(split, results, arguments.output_dir, error)) from error
            if trainer.is_world_process_zero():
                write_results(arguments.output_dir, arguments.model, results)
    finally:
        if results and trainer.is_world_process_zero():
            print(make_table(results))
    # Threads of gloo that are still connected when Python ends can abort an evaluation that is done.
    trainer.accelerator.end_training()


def _describe_failure(split: EvaluatedSplit, results: list[dict[str, Any]], folder: Path, error: Exception) -> str:
    """One sentence that begins with what is finished, because the message of the error may be long."""
    failed = f"{split.benchmark} {split.split} failed: {in_short(error)}"
    if not results:
        return failed
    first = "the split before it is" if len(results) == 1 else f"the {len(results)} splits before it are"
    return f"{first} finished, see {folder / 'evaluation.md'}, but {failed}"


def evaluate_split(trainer: EpmVGTrainer, split: EvaluatedSplit, arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Measures the boxes, the scores and the speed on a split, and writes its predictions, pictures and report.

    Returns:
        `dict`: `benchmark`, `split` and `folder`; what [`~accuracy.evaluate_boxes`] gives; `expressions_per_second`;
        `groups`, which has a list of [`GroupAccuracy`] as dictionaries for each way to tell expressions apart; and of
        a model with scores `scores`, what [`~score_quality.evaluate_scores`] gives.
    """
    dataset = split.dataset
    output = trainer.predict(dataset)
    predictions, scores = output.predictions, trainer.scores
    every_box = dataset["boxes"][:] if "boxes" in dataset.column_names else None
    boxes, has_box = find_boxes(dataset["box"][:], "the split")
    rows = np.flatnonzero(has_box)
    is_right = paired_iou(predictions[rows], boxes[rows]) >= 0.5
    groups = {title: accuracy_by_group(is_right, names) for title, names in name_groups(dataset, rows).items()}
    result: dict[str, Any] = {
        "benchmark": split.benchmark,
        "split": split.split,
        "folder": split.folder,
        **evaluate_boxes(predictions, boxes, dataset["image_id"][:], every_box),
        "expressions_per_second": output.metrics["test_samples_per_second"],
        "groups": {title: [asdict(group) for group in named] for title, named in groups.items()},
    }
    if scores is not None:
        is_absent = np.array(dataset["absent"][:]) if "absent" in dataset.column_names else np.zeros(len(boxes), bool)
        result["scores"] = evaluate_scores(scores, predictions, boxes, is_absent if is_absent.any() else None)
    if not trainer.is_world_process_zero():
        return result

    folder = arguments.output_dir
    write_predictions(folder / f"predictions_{split.label}.jsonl", dataset, predictions, boxes, scores)
    if scores is not None:
        draw_scores(folder / f"scores_{split.label}.png", scores[rows], is_right)
    for word, chosen in (("successes", rows[is_right]), ("failures", rows[~is_right])):
        if arguments.pictures and len(chosen):
            drawn = np.sort(np.random.default_rng(0).permutation(chosen)[: arguments.pictures])
            draw_rows(folder / f"{word}_{split.label}.png", dataset, drawn, predictions, boxes, columns=6)
    if arguments.report:
        page = make_error_report(
            f"{Path(arguments.model).resolve().name} on {split.benchmark} {split.split}",
            images=dataset["image"],
            image_ids=dataset["image_id"][:],
            expressions=dataset["expression"][:],
            boxes=predictions,
            true_boxes=boxes,
            scores=scores,
            groups=groups,
        )
        write_whole(folder / f"errors_{split.label}.html", page)
    return result


def name_groups(dataset: Dataset, rows: np.ndarray) -> dict[str, list]:
    """What groups these rows, which have boxes, belong to, as far as the dataset tells."""
    some = dataset.select(rows)
    groups = {name: some[name][:] for name in ("kind", "phrase_types") if name in dataset.column_names}
    if "num_boxes" in dataset.column_names:
        groups["num_boxes"] = [str(count) if count < 3 else "3 or more" for count in some["num_boxes"]]
    sizes: dict[str, tuple[int, int]] = {}
    for row, image_id in enumerate(some["image_id"]):
        if image_id not in sizes:
            sizes[image_id] = some[row]["image"].size
    named = zip(some["box"][:], some["image_id"][:], strict=True)
    return {**groups, "size": [size_of_box(box, *sizes[image_id]) for box, image_id in named]}


def write_results(folder: Path, model: str, results: list[dict[str, Any]]) -> None:
    """Writes the results of the splits that are finished as `evaluation.json` and `evaluation.md`."""
    write_whole(folder / "evaluation.json", json.dumps({"model": model, "results": results}, indent=2) + "\n")
    write_whole(folder / "evaluation.md", make_table(results))
    logger.info("%s %s is in %s", results[-1]["benchmark"], results[-1]["split"], folder / "evaluation.md")
