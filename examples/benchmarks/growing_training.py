#!/usr/bin/env python
"""The part of growth that trains: against rows of a dataset, from step to step, and in several processes.

For rows and processes, this file is started as a script with the name of the work, a folder and a number. The memory
is that of a process, without the pages of mapped files, which the system takes back when it must. It is read from
Linux.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as PilImage
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epmvg_hf import ClipTeacher, EpmVGImageProcessor, EpmVGTrainer, EpmVGTrainingArguments, ImageGroups
from epmvg_hf.distillation.teacher_cache import TeacherCache
from epmvg_hf.runs.arguments import ModelArguments
from epmvg_hf.runs.student import make_model

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.json"
TEACHER = f"local-dir:{Path(__file__).parents[2] / 'model_cards' / 'clip-tiny-shapes'}"
EXPRESSIONS_A_PICTURE = 7  # of the synthetic rows; RefCOCO has about as many
ROWS = [1_000, 10_000, 100_000, 1_000_000]
QUICK_ROWS = [100, 1_000]


@dataclass
class Point:
    """One measurement: of what, against which size, in seconds and megabytes (either may be missing)."""

    axis: str
    size: int
    what: str
    seconds: float | None = None
    megabytes: float | None = None


def measure_rows(folder: Path, quick: bool) -> list[Point]:
    """For each number of rows, the teacher's cache is filled here, and the training starts in a process of its own."""
    points = []
    teacher = ConstantTeacher.from_pretrained(TEACHER)
    for rows in QUICK_ROWS if quick else ROWS:
        dataset = make_rows(folder, rows, side=32)
        start = time.perf_counter()
        fill_cache(teacher, dataset, folder)
        points.append(Point("rows", rows, "fill the cache, without a teacher", time.perf_counter() - start))
        subprocess.run([sys.executable, __file__, "start", str(folder), str(rows)], check=True)
        points += [Point(**point) for point in json.loads((folder / "worker.json").read_text())]
    return points


def start_training(folder: Path, rows: int) -> None:
    """The work of a process: starts a training, takes its parts once more, and writes all measurements."""
    dataset = Dataset.from_file(str(folder / f"rows-{rows}.arrow"))
    points: list[Point] = []
    kept: list[Any] = []

    def measure(what: str, action: Callable[[], object]) -> None:
        gc.collect()
        before, start = private_memory(), time.perf_counter()
        kept.append(action())  # so that the next action cannot use its memory again
        seconds = time.perf_counter() - start
        points.append(Point("rows", rows, what, seconds, max(0, private_memory() - before) / 1e6))

    teacher = ConstantTeacher.from_pretrained(TEACHER)
    trainer = make_trainer(dataset, folder, teacher=teacher, image_size=32)
    measure("start, to the first batch", lambda: first_batch(trainer))
    loader = kept[0]
    measure("of which: group rows by image", lambda: ImageGroups(dataset))
    measure("of which: open the teacher's cache", lambda: fill_cache(teacher, dataset, folder))
    measure("100 batches of 4 pictures", lambda: [None for _ in islice(loader, 100)])
    (folder / "worker.json").write_text(json.dumps([asdict(point) for point in points]))


def fill_cache(teacher: ClipTeacher, dataset: Dataset, folder: Path) -> TeacherCache:
    """Fills the teacher's cache for these rows, or opens it if it is full."""
    image_processor = EpmVGImageProcessor(size={"height": 32, "width": 32})
    return TeacherCache.build(teacher, dataset, image_processor, folder / "teacher", disable_tqdm=True)


def make_rows(folder: Path, rows: int, side: int) -> Dataset:
    """A dataset of different expressions in a memory-mapped Arrow file, as `datasets` makes them; all share a file."""
    image, path = folder / f"{side}.jpg", folder / f"rows-{rows}.arrow"
    PilImage.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(image)
    box = List(Value("float32"), length=4)
    features = Features({"image": Image(), "image_id": Value("string"), "expression": Value("string"), "box": box})
    with ArrowWriter(features=features, path=str(path)) as writer:
        for start in range(0, rows, 1000):
            numbers = range(start, min(start + 1000, rows))
            columns = {
                "image": [{"bytes": None, "path": str(image)}] * len(numbers),
                "image_id": [f"picture {number // EXPRESSIONS_A_PICTURE}" for number in numbers],
                "expression": [f"the red star on the left of circle {number}" for number in numbers],
                "box": [[1.0, 2.0, 11.0, 22.0]] * len(numbers),
            }
            writer.write_table(pa.table(columns, schema=features.arrow_schema))
        writer.finalize()
    return Dataset.from_file(str(path))


def make_trainer(
    dataset: Dataset,
    folder: Path,
    image_size: int,
    teacher: ClipTeacher | None = None,
    callback: TrainerCallback | None = None,
    **changes: Any,
) -> EpmVGTrainer:
    """A quiet trainer of the demo's model on the CPU, in batches of 4 pictures."""
    torch.manual_seed(0)
    arguments = ModelArguments(config_name=str(CONFIG), image_size=image_size)
    model, processor = make_model(arguments, dataset[: 100 * EXPRESSIONS_A_PICTURE]["expression"], None)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "augment": False,
        "teacher_cache_dir": str(folder / "teacher"),
        "save_strategy": "no",
        "logging_steps": 500,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return EpmVGTrainer(
        model,
        EpmVGTrainingArguments(**{**settings, **changes}),
        train_dataset=dataset,
        processing_class=processor,
        teacher=teacher,
        callbacks=None if callback is None else [callback],
    )


def first_batch(trainer: EpmVGTrainer) -> DataLoader:
    """The loader of a training, from which one batch was read."""
    loader = trainer.get_train_dataloader()
    next(iter(loader))
    return loader


class StepRecorder(TrainerCallback):
    """Records the time of each step and, after each of `memory_steps` steps, the memory and the number of objects."""

    def __init__(self, memory_steps: int):
        self.memory_steps = memory_steps
        self.seconds: list[float] = []
        self.memory: list[tuple[int, int, int]] = []  # step, bytes, objects

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        if state.global_step % self.memory_steps == 0:
            gc.collect()
            self.memory.append((state.global_step, private_memory(), len(gc.get_objects())))
        self.start = time.perf_counter()


def measure_leak(folder: Path, quick: bool) -> tuple[list[Point], tuple[float, float]]:
    """
    A training of 2,000 steps with a cached teacher: the memory after some of the steps, and how many bytes and objects
    are added by a step. Its pictures are small, because what a step leaves behind does not depend on
    them. The first quarter of the steps is left out of the fit: it fills the allocator's pools.
    """
    steps, every = (20, 5) if quick else (2_000, 50)
    recorder = StepRecorder(every)
    make_trainer(
        make_rows(folder, 200, side=64),
        folder,
        image_size=64,
        teacher=ClipTeacher.from_pretrained(TEACHER),
        callback=recorder,
        max_steps=steps,
        per_device_train_batch_size=2,
        max_expressions_per_image=2,
    ).train()
    step, memory, objects = np.array(recorder.memory).T
    late = step > steps // 4
    points = [Point("step", int(at), "training", megabytes=int(used) / 1e6) for at, used, _ in recorder.memory]
    return points, (slope(step[late], memory[late]), slope(step[late], objects[late]))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """The median of the slopes of all pairs of points (Theil and Sen), which single jumps do not move."""
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def measure_processes(folder: Path, quick: bool) -> list[Point]:
    """Steps of one process and of two, which the launcher of PyTorch starts with this file."""
    points = []
    make_rows(folder, 7_000, side=128)
    for processes in (1, 2):
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        script = [__file__, "steps", str(folder), "4" if quick else "40"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *launcher, *script], check=True, env=environment)
        points += [Point(**point) for point in json.loads((folder / "worker.json").read_text())]
    return points


def train_steps(folder: Path, steps: int) -> None:
    """The work of one of several processes: it trains, and the first of them writes the median of its steps."""
    recorder = StepRecorder(memory_steps=steps)
    dataset = Dataset.from_file(str(folder / "rows-7000.arrow"))
    trainer = make_trainer(dataset, folder, image_size=128, callback=recorder, max_steps=steps)
    trainer.train()
    if trainer.is_world_process_zero():
        seconds, (_, memory, _) = statistics.median(recorder.seconds[steps // 4 :]), recorder.memory[0]
        point = Point("processes", trainer.args.world_size, "training step", seconds, memory / 1e6)
        (folder / "worker.json").write_text(json.dumps([asdict(point)]))
    trainer.accelerator.end_training()


def private_memory() -> int:
    """Bytes of this process in memory, without the pages of mapped files, which the system takes back when it must."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


class ConstantTeacher(ClipTeacher):
    """The embedded teacher, with outputs that cost nothing: only their cache is of interest."""

    def encode_images(
        self, pixel_values: torch.Tensor, output_patches: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        embeds = torch.ones(len(pixel_values), self.embed_dim)
        return embeds, embeds[:, None, None] if output_patches else None

    def encode_texts(self, expressions: list[str]) -> torch.Tensor:
        return torch.ones(len(expressions), self.embed_dim)


if __name__ == "__main__":
    work, folder, number = sys.argv[1:]
    {"start": start_training, "steps": train_steps}[work](Path(folder), int(number))
