#!/usr/bin/env python
"""What is a teacher worth to towers pretrained apart? A student on photos in many settings, of equal seeds and steps.

python examples/prepare_towers.py outputs/towers
python examples/train_teacher.py examples/configs/teachers/flickr30k_towers.yaml --data_dir DIR
python examples/study/photos.py --data_dir DIR                        # all runs; continues where it stopped
python examples/study/photos.py --data_dir DIR --half frozen --labelled 200 --seeds 0 # some of them
python examples/study/photo_report.py outputs/photo_study outputs/photo_study          # tables and plots

Each run writes a file to `--output_dir`, and runs whose files exist are not repeated.
"""

import argparse
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, List, Value, concatenate_datasets
from gap import measure_gap
from report import write_result
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from epmvg_hf import (
    ClipTeacher,
    EpmVGForVisualGrounding,
    EpmVGProcessor,
    EpmVGTrainer,
    EpmVGTrainingArguments,
    ImageGroups,
    add_teacher_boxes,
    load_grounding_dataset,
)
from epmvg_hf.evaluation.accuracy import paired_iou
from epmvg_hf.training.hardware import choose_compute

EXAMPLES = Path(__file__).parents[1]
CONFIG = EXAMPLES / "configs" / "study_towers.json"
COMPUTE = choose_compute(torch.device("cpu"))

NO_TERM = {"relation_loss_coefficient": 0.0, "feature_loss_coefficient": 0.0, "teacher_map_loss_coefficient": 0.0}
RELATION, FEATURE = {"relation_loss_coefficient": 1.0}, {"feature_loss_coefficient": 1.0}
TEACHER_MAP = {"teacher_map_loss_coefficient": 1.0}
ALL = RELATION | FEATURE | TEACHER_MAP


@dataclass(frozen=True)
class Setting:
    """
    What distinguishes a run.

    Attributes:
        description: for tables.
        box_map: weight of the map loss towards the box.
        terms: weights of the teacher's terms while boxes are learned; without any there is no teacher.
        captions: whether other photos without boxes take part.
        first: weights of the teacher's terms in a stage before, which has all captions and no boxes.
        teacher_boxes: whether a second stage before has boxes that the teacher draws for the phrases of all photos.
        predictor: name of a setting of which a student is trained first, with the same labels, whose boxes for the
            phrases of the other photos are learned beside the labels.
        confirmed: whether only those of them are learned that the teacher confirms.
        averaged: whether the mean of the two boxes is learned then, instead of that of the student.
        keeps_first: whether what stands before fusion stays after that stage as it is.
        teacher_towers: whether the towers are those of the teacher.
        extra_steps: whether the boxes have as many steps as all three stages together.
    """

    description: str
    box_map: float = 1.0
    terms: dict[str, float] = field(default_factory=dict)
    captions: bool = False
    first: dict[str, float] = field(default_factory=dict)
    teacher_boxes: bool = False
    predictor: str | None = None
    confirmed: bool = False
    averaged: bool = False
    keeps_first: bool = False
    teacher_towers: bool = False
    extra_steps: bool = False


SETTINGS = {
    "none": Setting("no teacher, no map loss", box_map=0.0),
    "box_map": Setting("no teacher (map from the box: the control)"),
    "longer": Setting("no teacher, as many steps as all stages have together", extra_steps=True),
    "teacher_map": Setting("teacher's map", terms=TEACHER_MAP),
    "relation": Setting("relation", terms=RELATION),
    "feature": Setting("feature", terms=FEATURE),
    "relation_feature": Setting("relation + feature", terms=RELATION | FEATURE),
    "all": Setting("all three terms", terms=ALL),
    "all_captions": Setting("all three terms, with captions", terms=ALL, captions=True),
    "map_captions": Setting("teacher's map, with captions", terms=TEACHER_MAP, captions=True),
    "first_map": Setting("teacher's map first, boxes after", first=TEACHER_MAP),
    "first_all": Setting("all three terms first, boxes after", first=ALL),
    "first_captions": Setting(
        "teacher's map first, boxes after with its map and captions",
        first=TEACHER_MAP,
        terms=TEACHER_MAP,
        captions=True,
    ),
    "first_kept": Setting(
        "teacher's map first, then boxes with that part frozen", first=TEACHER_MAP, keeps_first=True
    ),
    "first_then_map": Setting("teacher's map first, boxes after with its map", first=TEACHER_MAP, terms=TEACHER_MAP),
    "first_boxes": Setting("teacher's map and boxes first, boxes after", first=TEACHER_MAP, teacher_boxes=True),
    "first_boxes_then_map": Setting(
        "teacher's map and boxes first, boxes after with its map",
        first=TEACHER_MAP,
        teacher_boxes=True,
        terms=TEACHER_MAP,
    ),
    "own_boxes": Setting("no teacher, boxes of such a student for other photos", predictor="box_map"),
    "confirmed": Setting(
        "teacher's map first, boxes after and those of such a student for other photos that the teacher confirms",
        first=TEACHER_MAP,
        predictor="first_then_map",
        confirmed=True,
    ),
    "averaged": Setting(
        "teacher's map first, boxes after and means of the teacher's and those of such a student where they agree",
        first=TEACHER_MAP,
        predictor="first_then_map",
        confirmed=True,
        averaged=True,
    ),
    "confirmed_twice": Setting(
        "teacher's map first, boxes after and those that the teacher confirms of a student that learned such",
        first=TEACHER_MAP,
        predictor="confirmed",
        confirmed=True,
    ),
    "teacher_towers": Setting("no teacher, the towers are the teacher's own (the rival)", teacher_towers=True),
}

# The photos of this part of the train split are never trained on: what is tried out is compared on them, and only the
# settings of the tables see the validation split.
HELD_BACK = 250

# Which parameters are not trained, and the learning rates of the others. The towers are frozen in one half.
HALVES: dict[str, dict[str, Any]] = {
    "frozen": {
        "frozen_parameters": [r"^model\.vision_model\.", r"^model\.text_model\."],
        "cache_frozen_towers": True,
        "tower_cache_dtype": "float16",
    },
    "tuned": {
        "frozen_parameters": [r"_backbone\.conv_stem", r"_backbone\.blocks\.[0-3]\.", r"text_model\.embeddings"],
        "encoder_learning_rate": 1e-3,
        "vision_learning_rate": 2e-4,
        "text_learning_rate": 1e-4,
    },
}

# Photos in a step of the stage without boxes, where the relation term compares each expression with all of them.
FIRST_BATCH_SIZE = 128

# What of the student stands between its towers and fusion.
BEFORE_FUSION = [r"^model\.(input|visual|text)_projection", r"^model\.encoder\."]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with the files of flickr30k_entities")
    parser.add_argument("--vision", default="outputs/towers/efficientnet-lite0")
    parser.add_argument("--text", default="outputs/towers/minilm")
    parser.add_argument("--teacher", default="outputs/teacher_flickr30k_towers/teacher", help="folder of the teacher")
    parser.add_argument("--half", choices=list(HALVES), default="frozen")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument(
        "--labelled", nargs="+", type=int, default=[50, 200, 1_000, 7_331], help="labelled photos, or 0"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[800, 800, 1_600, 3_200], help="for each of --labelled"
    )
    parser.add_argument("--first_steps", type=int, default=800, help="steps of the stage without boxes")
    parser.add_argument(
        "--teacher_box_steps", type=int, default=2_400, help="steps of the stage with the teacher's boxes"
    )
    parser.add_argument("--predictor_steps", type=int, default=800, help="steps of the student that draws boxes")
    parser.add_argument("--evaluate_on", choices=["validation", "held_back"], default="validation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/photo_study"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if len(arguments.steps) != len(arguments.labelled):
        raise ValueError(f"--steps has {len(arguments.steps)} numbers for {len(arguments.labelled)} of --labelled")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    # Fewest labels first, and all settings of a seed before the next seed, so that early results can be compared.
    runs = [
        Run(arguments, name, labelled, steps, seed)
        for labelled, steps in zip(arguments.labelled, arguments.steps, strict=True)
        for seed in arguments.seeds
        for name in arguments.settings
    ]
    missing = [run for run in runs if not run.result_file.exists()]
    first = {run.first_folder: run for run in missing if run.setting.first and not run.first_folder.exists()}
    second = {
        run.second_folder: run for run in missing if run.setting.teacher_boxes and not run.second_folder.exists()
    }
    learners = [run for run in missing if run.predictor]
    # A predictor may itself learn the boxes of another, which is then trained before it.
    earlier = [run.predictor for run in learners if run.predictor and run.predictor.predictor]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        if missing and not teacher_file(arguments).exists():
            pool.apply(measure_teacher, [arguments])
        if any(run.needs_drawn_boxes for run in missing) and not drawn_file(arguments).exists():
            pool.apply(draw_boxes, [arguments])
        pool.map(distil_first, list(first.values()), chunksize=1)
        pool.map(learn_teacher_boxes, list(second.values()), chunksize=1)
        for learning in (earlier, learners):
            unpredicted = {run.predictions_file: run for run in learning if not run.predictions_file.exists()}
            pool.map(predict_others, list(unpredicted.values()), chunksize=1)
        pool.map(train_boxes, missing, chunksize=1)


@dataclass
class Run:
    """One training: what it is, and where it leaves its results."""

    arguments: argparse.Namespace
    name: str
    labelled: int
    steps: int
    seed: int

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.name]

    @property
    def total_steps(self) -> int:
        """The steps with labelled boxes; without any there are none."""
        if self.labelled == 0:
            return 0
        extra = self.arguments.first_steps + self.arguments.teacher_box_steps if self.setting.extra_steps else 0
        return self.steps + extra

    @property
    def predictor(self) -> "Run | None":
        """
        The run whose student predicts boxes for the other photos.

        Its towers are frozen in both halves, with which it takes minutes.
        """
        if self.setting.predictor is None:
            return None
        arguments = argparse.Namespace(**vars(self.arguments) | {"half": "frozen"})
        return Run(arguments, self.setting.predictor, self.labelled, self.arguments.predictor_steps, self.seed)

    @property
    def needs_drawn_boxes(self) -> bool:
        return self.setting.teacher_boxes or self.setting.confirmed

    @property
    def result_file(self) -> Path:
        folder = self.arguments.output_dir / f"{self.arguments.half}-{self.arguments.evaluate_on}"
        return folder / f"{self.name}-{self.labelled}-{self.seed}.json"

    @property
    def first_folder(self) -> Path:
        """
        Where the student is kept that a teacher alone has taught.

        Runs with other labels start from the same, and so do both halves: batches of 128 photos take seconds where the
        features of the towers are kept, and a minute each where the towers are tuned.
        """
        terms = "-".join(name.removesuffix("_loss_coefficient") for name in self.setting.first)
        name = f"{terms}-{self.arguments.first_steps}-{self.seed}"
        return self.arguments.output_dir / "first" / name

    @property
    def second_folder(self) -> Path:
        """Where the student is kept that has then learned the teacher's boxes."""
        return self.first_folder.with_name(f"{self.first_folder.name}-boxes-{self.arguments.teacher_box_steps}")

    @property
    def predictions_file(self) -> Path:
        """Where the boxes are kept that the predictor draws for the other photos. Both halves learn the same ones."""
        name = f"{self.setting.predictor}-{self.labelled}-{self.arguments.predictor_steps}-{self.seed}.npy"
        return self.arguments.output_dir / "predicted" / name


def teacher_file(arguments: argparse.Namespace) -> Path:
    """Where it is kept which rows of the test the teacher has right."""
    return arguments.output_dir / f"teacher-{arguments.evaluate_on}.json"


def measure_teacher(arguments: argparse.Namespace) -> None:
    """The boxes that the teacher draws for the rows of the test, to be compared with those of the students."""
    test = load_test(arguments)
    teacher = ClipTeacher.from_pretrained(f"local-dir:{arguments.teacher}")
    drawn = add_teacher_boxes(test.remove_columns("box"), teacher, disable_tqdm=True)
    write_result(teacher_file(arguments), {"right": right_rows(np.array(drawn["box"][:]), test)})


def drawn_file(arguments: argparse.Namespace) -> Path:
    """Where the boxes are kept that the teacher draws for the phrases of all photos that may be trained on."""
    return arguments.output_dir / "teacher-drawn.npy"


def draw_boxes(arguments: argparse.Namespace) -> None:
    """Lets the teacher see all photos once, and not again for every choice of labels."""
    start = time.time()
    teacher = ClipTeacher.from_pretrained(f"local-dir:{arguments.teacher}")
    drawn = add_teacher_boxes(load_phrases(arguments), teacher, disable_tqdm=True)
    save_boxes(drawn_file(arguments), np.array(drawn["box"][:]), start)


def save_boxes(file: Path, boxes: np.ndarray, start: float) -> None:
    """Saves under another name first, so that a killed run leaves no part of them that looks finished."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part.npy")
    np.save(part, boxes)
    part.replace(file)
    print(f"{file.name}: {round(time.time() - start)} s", flush=True)


def right_rows(boxes: np.ndarray, test: Dataset) -> str:
    """A digit for each row: 1 where its IoU is at least 0.5."""
    return "".join(map(str, (paired_iou(boxes, np.array(test["box"][:])) >= 0.5).astype(int)))


def distil_first(run: Run) -> None:
    """The stage without boxes: all captions in large batches, up to what stands before fusion, with frozen towers."""
    start = time.time()
    torch.set_num_threads(1)
    set_seed(run.seed)
    model, processor = make_student(run)
    teacher = ClipTeacher.from_pretrained(f"local-dir:{run.arguments.teacher}")
    captions = load_captions(run.arguments)
    trainer = make_trainer(
        run,
        model,
        processor,
        captions,
        teacher=teacher,
        terms=run.setting.first,
        half="frozen",
        max_steps=run.arguments.first_steps,
        per_device_train_batch_size=FIRST_BATCH_SIZE,
        dataloader_drop_last=True,
        distil_only=True,
    )
    trainer.train()
    save_stage(run.first_folder, model, trainer, start)


def learn_teacher_boxes(run: Run) -> None:
    """The stage that teaches the whole student with the boxes that the teacher draws, of which a person drew none."""
    start = time.time()
    torch.set_num_threads(1)
    set_seed(run.seed)
    model, processor = make_student(run)
    model.load_state_dict(EpmVGForVisualGrounding.from_pretrained(run.first_folder).state_dict())
    trainer = make_trainer(
        run,
        model,
        processor,
        with_boxes(load_phrases(run.arguments), np.load(drawn_file(run.arguments))),
        teacher=None,
        terms={},
        half="frozen",
        max_steps=run.arguments.teacher_box_steps,
        per_device_train_batch_size=8,
    )
    trainer.train()
    save_stage(run.second_folder, model, trainer, start)


def predict_others(run: Run) -> None:
    """Trains the student of another setting, and keeps its boxes for the phrases of the photos that have no labels."""
    start = time.time()
    torch.set_num_threads(1)
    set_seed(run.seed)
    assert run.predictor is not None
    trainer = make_student_trainer(run.predictor)
    trainer.train()
    others = load_phrases(run.arguments).select(rows_without_labels(run))
    save_boxes(run.predictions_file, trainer.predict(others).predictions, start)


def rows_without_labels(run: Run) -> np.ndarray:
    """Which phrases are of photos that have no labels in a run."""
    labelled = set(load_labelled(run.arguments, run.labelled, run.seed)["image_id"])
    return np.flatnonzero([name not in labelled for name in load_phrases(run.arguments)["image_id"]])


def load_predicted(run: Run) -> Dataset:
    """The phrases of the other photos with the boxes that are learned for them."""
    rows, boxes = predicted_boxes(run)
    return with_boxes(load_phrases(run.arguments).select(rows), boxes)


def predicted_boxes(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Which phrases get a box of the predictor, and these boxes: all, or those that the teacher confirms."""
    rows, boxes = rows_without_labels(run), np.load(run.predictions_file)
    if run.setting.confirmed:
        # What `confirm_boxes` does, which always gives the mean, with the boxes that the teacher has drawn already.
        drawn = np.load(drawn_file(run.arguments))[rows]
        is_kept = paired_iou(boxes, drawn) >= 0.5
        boxes = (boxes + drawn) / 2 if run.setting.averaged else boxes
        rows, boxes = rows[is_kept], boxes[is_kept]
    return rows, boxes


def with_boxes(phrases: Dataset, boxes: np.ndarray) -> Dataset:
    rows = phrases.remove_columns("sentence")
    return rows.add_column("box", boxes.tolist(), feature=List(Value("float32"), length=4))


def save_stage(folder: Path, model: EpmVGForVisualGrounding, trainer: EpmVGTrainer, start: float) -> None:
    """Saves under another name first, so that a killed run leaves no part of a stage that looks finished."""
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    log = {"seconds": round(time.time() - start), "log": trainer.state.log_history}
    (part / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    part.replace(folder)
    print(f"{folder.name}: {log['seconds']} s", flush=True)


def make_student_trainer(run: Run, eval_dataset: Dataset | None = None) -> EpmVGTrainer:
    """The trainer of a setting's last stage, in which labelled boxes are learned."""
    setting = run.setting
    model, processor = make_student(run)
    if setting.first:
        stage = run.second_folder if setting.teacher_boxes else run.first_folder
        model.load_state_dict(EpmVGForVisualGrounding.from_pretrained(stage).state_dict())
    further = None
    if setting.predictor:
        further = load_predicted(run)
    elif setting.captions:
        further = load_captions(run.arguments)
    return make_trainer(
        run,
        model,
        processor,
        load_labelled(run.arguments, run.labelled, run.seed) if run.labelled else None,
        teacher=ClipTeacher.from_pretrained(f"local-dir:{run.arguments.teacher}") if setting.terms else None,
        terms=setting.terms,
        half=run.arguments.half,
        max_steps=run.total_steps,
        frozen_parameters=HALVES[run.arguments.half]["frozen_parameters"]
        + (BEFORE_FUSION if setting.keeps_first else []),
        caption_dataset=further,
        eval_dataset=eval_dataset,
        # One seed is enough for a curve.
        eval_strategy="steps" if run.seed == 0 and run.labelled and eval_dataset is not None else "no",
        eval_steps=max(1, run.total_steps // 4),
        per_device_train_batch_size=8 * (1 if further is None else 2),
    )


def train_boxes(run: Run) -> None:
    start = time.time()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    set_seed(run.seed)
    test = load_test(run.arguments)
    trainer = make_student_trainer(run, test.select(range(min(800, len(test)))))
    model, processor = cast(EpmVGForVisualGrounding, trainer.model), trainer.processing_class
    before = measure_gap(model, processor, test)
    if run.labelled:
        trainer.train()
    output = trainer.predict(test)
    result = {
        "half": run.arguments.half,
        "setting": run.name,
        "labelled": run.labelled,
        "seed": run.seed,
        "steps": run.total_steps,
        "eval_rows": len(test),
        "acc@0.5": output.metrics["test_acc@0.5"],
        "mean_iou": output.metrics["test_mean_iou"],
        "right": right_rows(output.predictions, test),
        "gap_before": before,
        "gap_after": measure_gap(model, processor, test),
        "seconds": round(time.time() - start),
        "log": trainer.state.log_history,
    }
    write_result(run.result_file, result)
    print(
        f"{run.arguments.half} {run.name:16} {run.labelled:5} photos, seed {run.seed}: "
        f"Acc@0.5 {result['acc@0.5']:.3f}, {result['seconds']} s",
        flush=True,
    )


def make_student(run: Run) -> tuple[EpmVGForVisualGrounding, EpmVGProcessor]:
    """Towers pretrained apart, or those of the teacher, which began as the same, and a new fusion and head."""
    settings = json.loads(CONFIG.read_text()) | {"map_loss_coefficient": run.setting.box_map}
    towers = (run.arguments.vision, run.arguments.text)
    model = EpmVGForVisualGrounding.from_vision_text_pretrained(*towers, **settings)
    processor = EpmVGProcessor.from_vision_text_pretrained(*towers, model.config)
    if run.setting.teacher_towers:
        clip = ClipTeacher.from_pretrained(f"local-dir:{run.arguments.teacher}").clip
        # The student's vision tower ends where the last convolution of a classifier would begin.
        trunk = clip.visual.trunk.state_dict()
        trunk = {name: value for name, value in trunk.items() if not name.startswith(("conv_head.", "bn2."))}
        model.model.vision_model._backbone.load_state_dict(trunk)
        model.model.text_model.load_state_dict(clip.text.transformer.state_dict())
    return model.train(), processor


def make_trainer(
    run: Run,
    model: EpmVGForVisualGrounding,
    processor: EpmVGProcessor,
    train: Dataset | None,
    teacher: ClipTeacher | None,
    terms: dict[str, float],
    half: str,
    eval_dataset: Dataset | None = None,
    caption_dataset: Dataset | None = None,
    **changes: Any,
) -> EpmVGTrainer:
    args = {
        "output_dir": str(run.arguments.output_dir / "scratch" / f"{half}-{run.name}-{run.seed}"),
        "seed": run.seed,
        "per_device_eval_batch_size": 32,
        "max_expressions_per_image": 6,
        "learning_rate": 1e-3,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "augment": False,
        "use_cpu": True,
        "bf16": COMPUTE.precision == "bf16",
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return EpmVGTrainer(
        model=model,
        args=EpmVGTrainingArguments(**{**args, **NO_TERM, **terms, **HALVES[half], **changes}),
        train_dataset=train,
        eval_dataset=eval_dataset,
        processing_class=processor,
        teacher=teacher,
        caption_dataset=caption_dataset,
    )


def load_split(arguments: argparse.Namespace, split: str) -> Dataset:
    return load_grounding_dataset("flickr30k_entities", arguments.data_dir, split, missing_images="skip")


def photos_of_train(train: Dataset) -> list[list[int]]:
    """The rows of each photo of the train split, in an order that does not change."""
    groups = ImageGroups(train).groups
    return [groups[index] for index in np.random.default_rng(0).permutation(len(groups))]


def rows_of(photos: list[list[int]]) -> list[int]:
    return [row for photo in photos for row in photo]


def load_test(arguments: argparse.Namespace) -> Dataset:
    if arguments.evaluate_on == "validation":
        return load_split(arguments, "validation")
    train = load_split(arguments, "train")
    return train.select(rows_of(photos_of_train(train)[-HELD_BACK:]))


def load_labelled(arguments: argparse.Namespace, count: int, seed: int) -> Dataset:
    """The rows of `count` photos, of which each seed has others; of all there are in the same order for each seed."""
    train = load_split(arguments, "train")
    photos = photos_of_train(train)[:-HELD_BACK]
    if count < len(photos):
        photos = [photos[index] for index in np.random.default_rng(seed).permutation(len(photos))[:count]]
    return train.select(rows_of(photos))


def load_trainable(arguments: argparse.Namespace) -> Dataset:
    """The rows of all photos that may be trained on."""
    train = load_split(arguments, "train")
    return train.select(rows_of(photos_of_train(train)[:-HELD_BACK]))


def load_phrases(arguments: argparse.Namespace) -> Dataset:
    """The same without boxes."""
    return load_trainable(arguments).select_columns(["image", "image_id", "expression", "sentence"])


def load_captions(arguments: argparse.Namespace) -> Dataset:
    """Phrases and sentences of all photos, whose boxes are `None`."""
    phrases = load_phrases(arguments)
    seen: set[tuple[str, str]] = set()
    first_rows = []
    for row, key in enumerate(zip(phrases["image_id"][:], phrases["sentence"][:], strict=True)):
        if key not in seen:
            seen.add(key)
            first_rows.append(row)
    sentences = phrases.select(first_rows).remove_columns("expression").rename_column("sentence", "expression")
    captions = concatenate_datasets([phrases.remove_columns("sentence"), sentences])
    return captions.add_column("box", [None] * len(captions), feature=List(Value("float32"), length=4))


if __name__ == "__main__":
    main()
