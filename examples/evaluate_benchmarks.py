#!/usr/bin/env python
"""Evaluates a model on all splits of one or more benchmarks, and writes Acc@0.5 and more as one table.

accelerate launch examples/evaluate_benchmarks.py outputs/demo --benchmarks shapes
accelerate launch examples/evaluate_benchmarks.py MODEL --benchmarks refcoco=DIR gref_umd=DIR flickr30k_entities=DIR
accelerate launch examples/evaluate_benchmarks.py MODEL --benchmarks custom=DIR --splits test --box_format xyxy

Custom data, your own files, has no splits that the script could know, so they are named. Files other than COCO's JSON
also need --box_format, because their four numbers may be either. Rows without a box are left out.

The table goes to `evaluation.md` and `evaluation.json` in `--output_dir`. This script is not called evaluate.py,
because that would hide the library of that name, which it uses.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from datasets import Dataset

from epmvg_hf import (
    EpmVGForVisualGrounding,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    load_grounding_dataset,
)
from epmvg_hf.data.benchmarks import resolve_name
from epmvg_hf.data.shapes import SPLITS as SHAPES_SPLITS
from epmvg_hf.evaluation.accuracy import evaluate_boxes

logger = logging.getLogger("evaluate_benchmarks")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder or Hub id of a trained model.")
    parser.add_argument("--benchmarks", nargs="+", required=True, help="NAME=FOLDER for each benchmark, or shapes.")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=None,
        help="Splits to evaluate; all but train and trainval, needed for custom data.",
    )
    parser.add_argument(
        "--missing_images", choices=["error", "skip"], default="error", help="What to do with rows without an image."
    )
    parser.add_argument(
        "--errors", choices=["raise", "skip"], default="raise", help="What to do with rows that cannot be used."
    )
    parser.add_argument(
        "--box_format",
        choices=["xyxy", "xywh"],
        default=None,
        help="Meaning of the four numbers of a box in custom data; needed unless that is COCO's JSON.",
    )
    parser.add_argument(
        "--limit", type=int, default=None, help="Evaluate on the first expressions of each split only."
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Images in a batch of each process.")
    parser.add_argument("--bf16", action="store_true", help="Compute in bfloat16.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"), help="Folder for the table.")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO)
    training_arguments = EpmVGTrainingArguments(
        str(arguments.output_dir),
        per_device_eval_batch_size=arguments.batch_size,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    try:  # before the model is loaded, so that a mistake shows at once
        splits = load_all(arguments, training_arguments)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"evaluate_benchmarks.py: error: {error}") from error
    trainer = EpmVGTrainer(
        EpmVGForVisualGrounding.from_pretrained(arguments.model),
        training_arguments,
        processing_class=EpmVGProcessor.from_pretrained(arguments.model),
    )
    results = [{"benchmark": name, "split": split, **evaluate(trainer, dataset)} for name, split, dataset in splits]
    if trainer.is_world_process_zero():
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        record = {"model": arguments.model, "results": results}
        (arguments.output_dir / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
        (arguments.output_dir / "evaluation.md").write_text(table(results))
        print(table(results))


def load_all(
    arguments: argparse.Namespace, training_arguments: EpmVGTrainingArguments
) -> list[tuple[str, str, Dataset]]:
    """Name, split and rows of all that is evaluated."""
    splits = []
    for benchmark in arguments.benchmarks:
        name, _, folder = benchmark.partition("=")
        for split in arguments.splits or test_splits(name):
            with training_arguments.main_process_first(desc=f"preparing {name} {split}"):
                splits.append((name, split, load(name, folder or None, split, arguments)))
    return splits


def test_splits(name: str) -> list[str]:
    """All splits of a benchmark except the training splits."""
    if name == "custom":
        raise ValueError("custom data has no splits of its own: name the splits to evaluate with --splits")
    if name == "shapes":
        splits = tuple(SHAPES_SPLITS)
    else:
        benchmark, split_by = resolve_name(name)
        splits = benchmark.splits[split_by or next(iter(benchmark.splits))]
    return [split for split in splits if not split.startswith("train")]


def load(name: str, folder: str | None, split: str, arguments: argparse.Namespace) -> Dataset:
    """
    The rows of a split that have a box, for Flickr30K Entities also with the column `boxes` that its second protocol
    needs.
    """
    options = {}
    if name != "shapes":
        options = {"missing_images": arguments.missing_images, "errors": arguments.errors}
    if name == "custom":
        options["box_format"] = arguments.box_format
    elif name != "shapes" and resolve_name(name)[0].name == "flickr30k_entities":
        options["boxes"] = "any"
    dataset = load_grounding_dataset(name, folder, split, **options)
    with_box = [row for row, box in enumerate(dataset["box"]) if box is not None]
    if not with_box:
        raise ValueError(f"no expression of the {split} split of {name} has a box to compare with")
    if len(with_box) < len(dataset):
        logger.info("%s %s: %d expressions without a box are left out", name, split, len(dataset) - len(with_box))
        dataset = dataset.select(with_box)
    return dataset if arguments.limit is None else dataset.select(range(min(arguments.limit, len(dataset))))


def evaluate(trainer: EpmVGTrainer, dataset: Dataset) -> dict:
    """Measures [`~accuracy.evaluate_boxes`] and the speed on a split."""
    output = trainer.predict(dataset)
    every_box = dataset["boxes"][:] if "boxes" in dataset.column_names else None
    scores = evaluate_boxes(output.predictions, output.label_ids, dataset["image_id"][:], every_box)
    return {**scores, "expressions_per_second": output.metrics["test_samples_per_second"]}


def table(results: list[dict]) -> str:
    """A Markdown table with one row per split."""
    lines = [
        "| benchmark | split | expressions | images | Acc@0.5 (95 % interval) | any box | mean IoU | expressions/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cells = [
            result["benchmark"],
            result["split"],
            f"{result['expressions']:,}",
            f"{result['images']:,}",
            accuracy(result, "acc@0.5"),
            accuracy(result, "any_box_acc@0.5") if "any_box_acc@0.5" in result else "",
            f"{result['mean_iou']:.3f}",
            f"{result['expressions_per_second']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def accuracy(result: dict, name: str) -> str:
    """An accuracy with its 95 % interval, in percent."""
    low, high = result[f"{name}_interval"]
    return f"{100 * result[name]:.2f} ({100 * low:.2f} to {100 * high:.2f})"


if __name__ == "__main__":
    main()
