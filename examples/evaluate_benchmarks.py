#!/usr/bin/env python
"""Evaluates a model on all splits of one or more benchmarks, and writes Acc@0.5 and more as one table.

accelerate launch examples/evaluate_benchmarks.py outputs/demo --benchmarks shapes
accelerate launch examples/evaluate_benchmarks.py MODEL --benchmarks refcoco=DIR gref_umd=DIR flickr30k_entities=DIR
accelerate launch examples/evaluate_benchmarks.py MODEL --benchmarks custom=DIR --splits test --box_format xyxy

Custom data, your own files, has no splits that the script could know, so they are named. Files other than COCO's JSON
also need --box_format, because their four numbers may be either. Rows without a box are left out.

The table goes to `evaluation.md` and `evaluation.json` in `--output_dir`, with the accuracy by kind of expression,
number of boxes and size of box where the rows tell them. Of a model with scores, the table says what they are worth:
`--absent_per_image` adds expressions of other images, whose things are not there, for the AUROC; scores_NAME_SPLIT.png
shows calibration and coverage. `--pictures 24` draws so many right and so many wrong boxes, chosen by a fixed seed.

This script is not called evaluate.py, because that would hide the library of that name, which it uses.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
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
from epmvg_hf.evaluation.accuracy import evaluate_boxes, find_boxes, paired_iou
from epmvg_hf.evaluation.accuracy_by_group import accuracy_by_group, size_of_box
from epmvg_hf.evaluation.score_quality import draw_scores, evaluate_scores
from epmvg_hf.evaluation.visualization import draw_grid

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
    parser.add_argument(
        "--absent_per_image", type=int, default=None, help="Expressions to add to each image that name nothing in it."
    )
    parser.add_argument(
        "--pictures", type=int, default=0, help="How many right and how many wrong boxes of each split to draw."
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
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for name, split, dataset in splits:
        place = arguments.output_dir / f"NAME_{name}_{split}.png"
        results.append({"benchmark": name, "split": split, **evaluate(trainer, dataset, place, arguments.pictures)})
    if trainer.is_world_process_zero():
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
    The rows of a split that have a box or are known to be absent, for Flickr30K Entities also with the column `boxes`
    that its second protocol needs.
    """
    options: dict[str, Any] = {"absent_per_image": arguments.absent_per_image}
    if name != "shapes":
        options |= {"missing_images": arguments.missing_images, "errors": arguments.errors}
    if name == "custom":
        options["box_format"] = arguments.box_format
    elif name != "shapes" and resolve_name(name)[0].name == "flickr30k_entities":
        options["boxes"] = "any"
    dataset = load_grounding_dataset(name, folder, split, **options)
    absent = dataset["absent"][:] if "absent" in dataset.column_names else [False] * len(dataset)
    used = [row for row, box in enumerate(dataset["box"]) if box is not None or absent[row]]
    if not any(box is not None for box in dataset["box"]):
        raise ValueError(f"no expression of the {split} split of {name} has a box to compare with")
    if len(used) < len(dataset):
        logger.info("%s %s: %d expressions without a box are left out", name, split, len(dataset) - len(used))
        dataset = dataset.select(used)
    return dataset if arguments.limit is None else dataset.select(range(min(arguments.limit, len(dataset))))


def evaluate(trainer: EpmVGTrainer, dataset: Dataset, place: Path, pictures: int) -> dict[str, Any]:
    """
    Measures [`~accuracy.evaluate_boxes`], the scores and the speed on a split. Pictures are written to `place`, whose
    name has the word NAME where it says what they show.
    """
    output = trainer.predict(dataset)
    every_box = dataset["boxes"][:] if "boxes" in dataset.column_names else None
    boxes, has_box = find_boxes(dataset["box"][:], "the split")
    result: dict[str, Any] = evaluate_boxes(output.predictions, boxes, dataset["image_id"][:], every_box)
    result["expressions_per_second"] = output.metrics["test_samples_per_second"]
    rows = np.flatnonzero(has_box)
    is_right = paired_iou(output.predictions[rows], boxes[rows]) >= 0.5
    result["groups"] = {
        title: [asdict(group) for group in accuracy_by_group(is_right, names)]
        for title, names in name_groups(dataset, rows).items()
    }
    if trainer.scores is not None:
        absent = np.array(dataset["absent"][:]) if "absent" in dataset.column_names else None
        result["scores"] = evaluate_scores(trainer.scores, output.predictions, boxes, absent)
    if trainer.is_world_process_zero():
        if trainer.scores is not None:
            draw_scores(place.with_name(place.name.replace("NAME", "scores")), trainer.scores[rows], is_right)
        for word, chosen in (("successes", rows[is_right]), ("failures", rows[~is_right])):
            if pictures and len(chosen):
                drawn = np.sort(np.random.default_rng(0).permutation(chosen)[:pictures])
                draw_rows(place.with_name(place.name.replace("NAME", word)), dataset, drawn, output.predictions, boxes)
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


def draw_rows(place: Path, dataset: Dataset, rows: np.ndarray, predictions: np.ndarray, boxes: np.ndarray) -> None:
    """Draws the predicted and the true boxes of these rows."""
    chosen = [dataset[int(row)] for row in rows]
    draw_grid(
        place,
        images=[row["image"] for row in chosen],
        expressions=[row["expression"] for row in chosen],
        boxes=predictions[rows],
        true_boxes=boxes[rows],
        columns=6,
    )


def table(results: list[dict]) -> str:
    """Markdown tables: one with a row per split, and one with the groups of each split."""
    lines = [
        "| benchmark | split | expressions | images | Acc@0.5 (95 % interval) | any box | mean IoU "
        "| calibration error | AUROC of absence | expressions/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        scores = result.get("scores", {})
        cells = [
            result["benchmark"],
            result["split"],
            f"{result['expressions']:,}",
            f"{result['images']:,}",
            accuracy(result, "acc@0.5"),
            accuracy(result, "any_box_acc@0.5") if "any_box_acc@0.5" in result else "",
            f"{result['mean_iou']:.3f}",
            *(f"{scores[name]:.3f}" if name in scores else "" for name in ("calibration_error", "presence_auroc")),
            f"{result['expressions_per_second']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| benchmark | split | what | group | expressions | Acc@0.5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for title, groups in result["groups"].items():
            for group in groups:
                where = f"{result['benchmark']} | {result['split']} | {title.replace('_', ' ')}"
                lines.append(f"| {where} | {group['name']} | {group['count']:,} | {100 * group['accuracy']:.2f} |")
    return "\n".join(lines) + "\n"


def accuracy(result: dict, name: str) -> str:
    """An accuracy with its 95 % interval, in percent."""
    low, high = result[f"{name}_interval"]
    return f"{100 * result[name]:.2f} ({100 * low:.2f} to {100 * high:.2f})"


if __name__ == "__main__":
    main()
