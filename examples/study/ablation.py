#!/usr/bin/env python
"""What does each term of the distillation contribute? One tiny student in many settings, of equal seeds and steps.

python examples/study/ablation.py                            # all runs; continues where it stopped
python examples/study/ablation.py --settings none box_map --labelled 500 --seeds 0 # some of them
python examples/study/ablation.py --report_only              # table and plot of finished runs

Each run writes a file to `--output_dir`, and runs whose files exist are not repeated.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset
from gap import measure_gap
from report import Results, accuracy_table, gap_table, markdown, plot_accuracy, table_of_runs, write_result
from teacher_towers import STRIDE, load_towers, tower_configs
from transformers import set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from epmvg_hf import (
    ClipTeacher,
    EpmVGConfig,
    EpmVGForVisualGrounding,
    EpmVGImageProcessor,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    ImageGroups,
    load_grounding_dataset,
)
from epmvg_hf.data.shapes import KINDS
from epmvg_hf.evaluation.accuracy import paired_iou
from epmvg_hf.runs.trained_tokenizer import train_tokenizer
from epmvg_hf.training.hardware import choose_compute

EXAMPLES = Path(__file__).parents[1]
COMPUTE = choose_compute(torch.device("cpu"))
NO_TERM = {"relation_loss_coefficient": 0.0, "feature_loss_coefficient": 0.0, "teacher_map_loss_coefficient": 0.0}
RELATION, FEATURE = {"relation_loss_coefficient": 1.0}, {"feature_loss_coefficient": 1.0}
TEACHER_MAP = {"teacher_map_loss_coefficient": 1.0, "teacher_map_rows": "all"}

# With captions, the teacher's map is taught to the rows that have no box.
CAPTIONS = RELATION | FEATURE | TEACHER_MAP | {"teacher_map_rows": "without_box"}

# For each setting, the weight of the map loss towards the box, and the training arguments that it changes.
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "none": (0.0, {}),
    "box_map": (1.0, {}),
    "both_maps": (1.0, TEACHER_MAP),
    "all_captions": (1.0, CAPTIONS),
    "all_captions_3": (1.0, CAPTIONS | {"caption_ratio": 3.0}),
    "teacher_map_captions_3": (0.0, TEACHER_MAP | {"caption_ratio": 3.0}),
    "all": (1.0, RELATION | FEATURE | TEACHER_MAP),
    "relation_feature": (0.0, RELATION | FEATURE),
    "light_relation_feature": (0.0, dict.fromkeys(RELATION | FEATURE, 0.1)),
    "teacher_map": (0.0, TEACHER_MAP),
    "relation": (0.0, RELATION),
    "feature": (0.0, FEATURE),
    "teacher_towers": (1.0, {}),
}
DESCRIPTIONS = {
    "none": "no distillation, no map loss",
    "box_map": "map from the box (no teacher: the control)",
    "both_maps": "map from the box and from the teacher (the default)",
    "all_captions": "all + captions, 1 captioned image per labelled one",
    "all_captions_3": "all + captions, 3 captioned images per labelled one",
    "teacher_map_captions_3": "map from the teacher + captions, 3 captioned images per labelled one",
    "all": "all: map from the box and from the teacher, relation, feature",
    "relation_feature": "relation + feature",
    "light_relation_feature": "relation + feature, each with weight 0.1",
    "teacher_map": "map from the teacher",
    "relation": "relation",
    "feature": "feature",
    "teacher_towers": "map from the box, backbones are the teacher's towers (control)",
}
BATCH_SIZE, EXPRESSIONS_PER_IMAGE = 8, 8
MAX_CAPTIONED_IMAGES = 5_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=f"local-dir:{EXAMPLES.parent / 'model_cards' / 'clip-tiny-shapes'}")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--labelled", nargs="+", type=int, default=[500, 2_000, 16_000], help="labelled expressions")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1_000, help="optimizer steps of every run")
    parser.add_argument("--eval_rows", type=int, default=2_000, help="first rows of the test split")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--results", type=Path, default=None, help="folder for table and plot, default: output_dir")
    parser.add_argument("--report_only", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    check_study(arguments)
    # Fewest labels first, and all settings of a seed before the next seed, so that early results can be compared.
    runs = [
        (name, labelled, seed)
        for labelled in arguments.labelled
        for seed in arguments.seeds
        for name in arguments.settings
        if not result_file(arguments, name, labelled, seed).exists()
    ]
    if runs and not arguments.report_only:
        with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
            pool.starmap(train_one, [(arguments, *run) for run in runs], chunksize=1)
    write_report(arguments)


def check_study(arguments: argparse.Namespace) -> None:
    """Writes the arguments into the folder, so that results with other arguments do not end up in the same table."""
    study = {name: str(getattr(arguments, name)) for name in ("teacher", "steps", "eval_rows")}
    file = arguments.output_dir / "study.json"
    if file.exists() and (other := json.loads(file.read_text())) != study:
        raise ValueError(f"{arguments.output_dir} holds results of {other}, not of {study}: give another --output_dir")
    file.write_text(json.dumps(study, indent=1) + "\n")


def result_file(arguments: argparse.Namespace, name: str, labelled: int, seed: int) -> Path:
    return arguments.output_dir / f"{name}-{labelled}-{seed}.json"


def train_one(arguments: argparse.Namespace, name: str, labelled: int, seed: int) -> None:
    torch.set_num_threads(1)
    start = time.time()
    train, captioned, test = load_data(arguments, labelled, seed)
    if "captions" not in name:
        captioned = None
    map_weight, changes = SETTINGS[name]
    teacher = ClipTeacher.from_pretrained(arguments.teacher) if changes else None
    set_seed(seed)
    if "towers" in name:
        model, processor = make_teacher_towers(ClipTeacher.from_pretrained(arguments.teacher), map_weight)
    else:
        model, processor = make_student(map_weight, load_split("train")["expression"])
    gap_before = measure_gap(model, processor, test)
    trainer = EpmVGTrainer(
        model=model,
        args=EpmVGTrainingArguments(
            output_dir=str(arguments.output_dir / "scratch" / f"{name}-{labelled}-{seed}"),
            seed=seed,
            max_steps=arguments.steps,
            # Twice as many images if half of them have no boxes, so that every setting sees as many boxes.
            per_device_train_batch_size=BATCH_SIZE * (1 if captioned is None else 2),
            per_device_eval_batch_size=32,
            max_expressions_per_image=EXPRESSIONS_PER_IMAGE,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=1e-2,
            augment=False,
            use_cpu=True,
            bf16=COMPUTE.precision == "bf16",
            eval_strategy="steps",
            eval_steps=arguments.steps // 2,
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{**NO_TERM, **changes},
        ),
        train_dataset=train,
        eval_dataset=test.select(range(min(800, len(test)))),
        processing_class=processor,
        teacher=teacher,
        caption_dataset=captioned,
    )
    trainer.train()
    output = trainer.predict(test)
    right = paired_iou(output.predictions, output.label_ids) >= 0.5
    result = {
        "setting": name,
        "labelled": len(train),
        "captioned_images": 0 if captioned is None else len(set(captioned["image_id"])),
        "seed": seed,
        "steps": arguments.steps,
        "eval_rows": len(test),
        "acc@0.5": output.metrics["test_acc@0.5"],
        "mean_iou": output.metrics["test_mean_iou"],
        "acc@0.5_by_kind": by_kind(test, right),
        "gap_before": gap_before,
        "gap_after": measure_gap(model, processor, test),
        "seconds": round(time.time() - start),
        "log": trainer.state.log_history,
    }
    write_result(result_file(arguments, name, labelled, seed), result)
    print(f"{name:28} {labelled:6} seed {seed}: Acc@0.5 {result['acc@0.5']:.3f}, {result['seconds']} s", flush=True)


def by_kind(test: Dataset, right: np.ndarray) -> dict[str, float]:
    """Accuracy for each kind of expression."""
    kinds = np.array(test["kind"])
    return {str(kind): float(right[kinds == kind].mean()) for kind in np.unique(kinds)}


def load_split(split: str) -> Dataset:
    return load_grounding_dataset("shapes", split=split)


def load_data(arguments: argparse.Namespace, labelled: int, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Rows of whole images, cut to `labelled`; up to ten times as many other images without boxes; and test rows."""
    train = load_split("train")
    groups = ImageGroups(train).groups
    order = np.random.default_rng(seed).permutation(len(groups))
    ends = np.cumsum([len(groups[image]) for image in order])
    first_captioned = int(np.searchsorted(ends, labelled) + 1)
    last_captioned = min(first_captioned * 11, first_captioned + MAX_CAPTIONED_IMAGES, len(groups))

    def rows_of(images: np.ndarray) -> list[int]:
        return [row for image in images for row in groups[image]]

    captioned = train.select(rows_of(order[first_captioned:last_captioned])).remove_columns("box")
    test = load_split("test")
    test = test.select(range(min(arguments.eval_rows, len(test))))
    return train.select(rows_of(order[:first_captioned])[:labelled]), captioned, test


def make_student(map_weight: float, expressions: list[str]) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    config = EpmVGConfig.from_json_file(EXAMPLES / "configs" / "ablation.json")
    config.map_loss_coefficient = map_weight
    tokenizer = train_tokenizer(expressions, config.text_config.vocab_size)
    config.text_config.vocab_size = len(tokenizer)
    image_processor = EpmVGImageProcessor(size={"height": config.image_size, "width": config.image_size})
    return build(config), EpmVGProcessor(image_processor, tokenizer, config.max_text_length)


def make_teacher_towers(teacher: ClipTeacher, map_weight: float) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    """The same fusion and head on the teacher's own towers, which are fine-tuned."""
    side = teacher.image_size
    student = EpmVGConfig.from_json_file(EXAMPLES / "configs" / "ablation.json").to_diff_dict()
    changes = {"backbone_stride": STRIDE, "image_size": side, "map_loss_coefficient": map_weight}
    config = EpmVGConfig(**{**student, **tower_configs(teacher), **changes, "teacher_projection_dim": None})
    model = build(config)
    load_towers(model.model, teacher)
    image_processor = EpmVGImageProcessor(
        size={"height": side, "width": side}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
    )
    return model, EpmVGProcessor(image_processor, teacher.tokenizer.tokenizer, config.max_text_length)


def build(config: EpmVGConfig) -> EpmVGForVisualGrounding:
    # On the CPU of the study, this was faster than sdpa.
    config._attn_implementation = COMPUTE.attn_implementation
    return EpmVGForVisualGrounding(config)


def descriptions_of(arguments: argparse.Namespace) -> dict[str, str]:
    return {name: DESCRIPTIONS[name] for name in arguments.settings}


def write_report(arguments: argparse.Namespace) -> None:
    """Writes `ablation.md` and `ablation.png` from the results of all settings, labels and seeds in the arguments."""
    folder = arguments.results or arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        (name, labelled): [
            json.loads(file.read_text())
            for seed in arguments.seeds
            if (file := result_file(arguments, name, labelled, seed)).exists()
        ]
        for name in arguments.settings
        for labelled in arguments.labelled
    }
    descriptions = descriptions_of(arguments)
    few = {name: runs for name in arguments.settings if (runs := results[name, arguments.labelled[0]])}
    sections = [
        "Acc@0.5, mean ± standard deviation over seeds (number of seeds):",
        accuracy_table(descriptions, arguments.labelled, results),
        "Each run, by seed:",
        table_of_runs(descriptions, arguments.labelled, results),
        "Modality gap, few labels, mean over seeds (before -> after training):",
        gap_table(descriptions, arguments.labelled[0], results),
        "Acc@0.5 by kind of expression, few labels, mean over seeds:",
        kind_table(few),
    ]
    report = "\n\n".join(sections) + "\n"
    (folder / "ablation.md").write_text(report)
    plot(folder / "ablation.png", arguments, results)
    print(report)


def kind_table(few: dict[str, list[dict]]) -> str:
    def mean(runs: list[dict], kind: str) -> str:
        return f"{statistics.mean(run['acc@0.5_by_kind'][kind] for run in runs):.3f}"

    rows = [[DESCRIPTIONS[name], *(mean(runs, kind) for kind in KINDS)] for name, runs in few.items()]
    return markdown(["setting", *KINDS], rows)


def plot(file: Path, arguments: argparse.Namespace, results: Results) -> None:
    figure, axis = plt.subplots(figsize=(9, 5))
    plot_accuracy(axis, descriptions_of(arguments), arguments.labelled, results, "expressions")
    axis.set_ylim(0, None)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
