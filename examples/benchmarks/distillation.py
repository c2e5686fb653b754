"""Time of a training step without a teacher, with a cached teacher, and with a teacher that runs in every step.

It is measured with the demo's model, data and teacher on the CPU.
The three trainings take turns, step by step, on the same batches, so other work of the machine slows them down alike.
"""

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from epmvg_hf import ClipTeacher, EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from epmvg_hf.runs.arguments import ModelArguments
from epmvg_hf.runs.student import make_model
from epmvg_hf.training.hardware import choose_compute

EXAMPLES = Path(__file__).parents[1]
CONFIG = EXAMPLES / "configs" / "tiny.json"
TEACHER = f"local-dir:{EXAMPLES.parent / 'model_cards' / 'clip-tiny-shapes'}"
# The modes in the order of their turns. The one after "on the fly" finds the processor's caches filled by the teacher,
# which may slow it down. That should be "cached", whose speed is in question, and not the baseline.
MODES = ("on the fly", "cached", "no teacher")
WARM_UP = 5
BATCH_SIZE = 8  # images


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


def measure(quick: bool, steps: int | None = None) -> list[dict[str, Any]]:
    """
    Args:
        quick (`bool`): whether to take few steps.
        steps (`int`, *optional*): the steps of each training; without it 200, after 5 to warm up.

    Returns:
        `list[dict]`: a row for each training, with the median time of a step and of its ratio to the same step without
        a teacher.
    """
    steps = steps or (3 if quick else 200)
    teacher = ClipTeacher.from_pretrained(TEACHER)
    dataset = load_grounding_dataset("shapes", split="train", num_images=8 if quick else 400)
    batons = [threading.Semaphore(0) for _ in MODES]
    turns = [Turns(own, following) for own, following in zip(batons, batons[1:] + batons[:1], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            make_trainer(mode, teacher, dataset, folder, own, steps) for mode, own in zip(MODES, turns, strict=True)
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        batons[0].release()
        for thread in threads:
            thread.join()
    return compare(np.array([own.seconds[WARM_UP:] for own in turns]))


def make_trainer(
    mode: str, teacher: ClipTeacher, dataset: Dataset, folder: str, turns: Turns, steps: int
) -> EpmVGTrainer:
    torch.manual_seed(0)
    compute = choose_compute(torch.device("cpu"))
    model_arguments = ModelArguments(config_name=str(CONFIG), attn_implementation=compute.attn_implementation)
    model, processor = make_model(model_arguments, dataset["expression"], None)
    args = EpmVGTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        bf16=compute.precision == "bf16",
        max_steps=WARM_UP + steps,
        per_device_train_batch_size=BATCH_SIZE,
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


def compare(seconds: np.ndarray) -> list[dict[str, Any]]:
    """Medians of `seconds` `(3, steps)` by mode, and of their ratios to the same step without a teacher."""
    ratios = seconds / seconds[MODES.index("no teacher")] - 1
    steps = seconds.shape[1]
    resampled = np.random.default_rng(0).integers(steps, size=(10_000, steps))
    rows = []
    for mode, taken, ratio in zip(MODES, seconds, ratios, strict=True):
        low, high = np.quantile(np.median(ratio[resampled], axis=1), [0.025, 0.975])
        row = {
            "teacher": mode,
            "ms a step": 1e3 * float(np.median(taken)),
            "against no teacher": f"{np.median(ratio):+.1%}",
            "95 % interval": f"{low:+.1%} to {high:+.1%}",
        }
        rows.append(row)
    return rows
