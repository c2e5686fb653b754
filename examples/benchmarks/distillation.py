#!/usr/bin/env python
"""Time of a training step without a teacher, with a cached teacher, and with a teacher that runs in every step.

python examples/benchmarks/distillation.py                       # the demo's model, data and teacher
python examples/benchmarks/distillation.py --steps 300 --threads 1

The three trainings take turns, step by step, on the same batches, so other work of the machine slows them down alike.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the modules that all examples share

from run_grounding import ModelArguments, make_model

from epmvg_hf import ClipTeacher, EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.training.hardware import choose_compute

EXAMPLES = Path(__file__).parents[1]
COMPUTE = choose_compute(torch.device("cpu"))
# The modes in the order of their turns. The one after "on the fly" finds the processor's caches filled by the teacher,
# which may slow it down. That should be "cached", whose speed is in question, and not the baseline.
MODES = ("on the fly", "cached", "no teacher")
WARM_UP = 5


class Turns(TrainerCallback):
    """Lets trainings in several threads take turns after every step, and measures how long each step takes."""

    def __init__(self, own: threading.Semaphore, following: threading.Semaphore):
        self.own, self.following = own, following
        self.seconds: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.own.acquire()
        self.start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.following.release()
        self.own.acquire()
        # The clock starts here, so that the time of a step includes loading its batch.
        self.start = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.following.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=f"local-dir:{EXAMPLES.parent / 'model_cards' / 'clip-tiny-shapes'}")
    parser.add_argument("--config_name", default="tiny.json", help="model configuration, see run_grounding.py")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=200, help="steps to measure in each mode, after 5 to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    teacher = ClipTeacher.from_pretrained(arguments.teacher)
    dataset = load_grounding_dataset("shapes", split="train", num_images=arguments.images)
    batons = [threading.Semaphore(0) for _ in MODES]
    turns = [Turns(own, following) for own, following in zip(batons, batons[1:] + batons[:1], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            make_trainer(arguments, mode, teacher, dataset, folder, own)
            for mode, own in zip(MODES, turns, strict=True)
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        batons[0].release()
        for thread in threads:
            thread.join()
    report(arguments, np.array([own.seconds[WARM_UP:] for own in turns]))


def make_trainer(
    arguments: argparse.Namespace, mode: str, teacher: ClipTeacher, dataset: Dataset, folder: str, turns: Turns
) -> EpmVGTrainer:
    torch.manual_seed(0)
    model_arguments = ModelArguments(
        config_name=arguments.config_name, attn_implementation=COMPUTE.attn_implementation
    )
    model, processor = make_model(model_arguments, dataset["expression"], None)
    args = EpmVGTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=COMPUTE.precision == "bf16",
        max_steps=WARM_UP + arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        augment=False,
        cache_teacher=mode == "cached",
        save_strategy="no",
        logging_steps=1_000,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return EpmVGTrainer(
        model,
        args,
        train_dataset=dataset,
        processing_class=processor,
        teacher=None if mode == "no teacher" else teacher,
        callbacks=[turns],
    )


def report(arguments: argparse.Namespace, seconds: np.ndarray) -> None:
    """Prints medians of `seconds` `(3, steps)` by mode, and of their ratios to the same step without a teacher."""
    medians = np.median(seconds, axis=1)
    ratios = seconds / seconds[MODES.index("no teacher")] - 1
    resampled = np.random.default_rng(0).integers(arguments.steps, size=(10_000, arguments.steps))
    for mode, median, ratio in zip(MODES, medians, ratios, strict=True):
        low, high = np.quantile(np.median(ratio[resampled], axis=1), [0.025, 0.975])
        print(
            f"{mode:12} {median * 1e3:8.1f} ms a step, {np.median(ratio):+.1%} against the same step without a "
            f"teacher (95 % interval {low:+.1%} to {high:+.1%})"
        )
    print(
        json.dumps({"threads": arguments.threads, "steps": arguments.steps, **dict(zip(MODES, medians, strict=True))})
    )


if __name__ == "__main__":
    main()
