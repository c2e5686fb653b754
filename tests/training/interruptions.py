"""
Trainings that are killed (SIGKILL) and resumed until they end, compared with ones that were not. Each has a process
that is forked from a server which has imported everything, so that it begins within milliseconds. A fork of this
process could not train once this process has: autograd's threads do not survive it.

python tests/training/interruptions.py 40      # that many kills at random moments of each kind of training
"""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for running this file as a script

from transformers import TrainerCallback

from epmvg_hf import EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset
from tests.fixtures.models import ONE_STEP, tiny_model, tiny_processor
from tests.fixtures.tiny_teacher import TinyTeacher

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "mean_iou", "greater_is_better": True}
AUGMENTED = {"augment": True, "max_expressions_per_image": 3}

# For each kind of training its arguments, and which parts it has beside the student.
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "average and augmentation": ({"ema_decay": 0.9, **AUGMENTED}, ()),
    "cached teacher": ({"cache_teacher": True}, ("teacher",)),
    "teacher in every step, augmentation": (AUGMENTED, ("teacher",)),
    "captions mixed in": ({**AUGMENTED, "caption_ratio": 1.0}, ("teacher", "captions")),
    "staged freezing, cached towers": ({"freeze_backbone_epochs": 1, "cache_frozen_towers": True}, ()),
    "best model, accumulation": (EVALUATED | BEST | {"gradient_accumulation_steps": 2, "save_total_limit": 1}, ()),
}


# What a process does before it trains in a folder; it may return callbacks.
Preparation = Callable[[Path], list[TrainerCallback] | None]


class KillAt(TrainerCallback):
    """Kills the process at the n-th of the moments that a training passes through, in and between its steps."""

    def __init__(self, moment: int):
        self.left = moment

    def _pass(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    on_step_begin = on_pre_optimizer_step = on_step_end = on_prediction_step = on_evaluate = on_save = _pass


def kill_at(moment: int, folder: Path) -> list[TrainerCallback]:
    """Kills the training in a folder at the n-th moment of [`KillAt`]."""
    return [KillAt(moment)]


def count_writes_and_kill(moment: int, folder: Path) -> None:
    """Kills this process when it is about to make the n-th change among the files below a folder."""
    left = moment

    def hook(event: str, details: tuple) -> None:
        nonlocal left
        writes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
        writes = writes or (event == "open" and isinstance(details[1], str) and "w" in details[1])
        if writes and str(details[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def make_trainer(
    kind: str, folder: Path, callbacks: list[TrainerCallback] | None = None, max_steps: int = 8
) -> EpmVGTrainer:
    arguments, parts = KINDS[kind]
    dataset = load_grounding_dataset("shapes", split="train", num_images=8, cache_dir=str(folder / "data"))
    settings = {**ONE_STEP, "save_strategy": "steps", "save_steps": 2, "max_steps": max_steps, "learning_rate": 1e-2}
    caches = {"teacher_cache_dir": str(folder / "teacher"), "tower_cache_dir": str(folder / "towers")}
    return EpmVGTrainer(
        model=tiny_model(box_head="map", frozen_batch_norm=True, dropout=0.1),
        args=EpmVGTrainingArguments(
            **{**settings, **caches, **arguments}, output_dir=str(folder / "run"), per_device_train_batch_size=2
        ),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        processing_class=tiny_processor(),
        teacher=TinyTeacher() if "teacher" in parts else None,
        caption_dataset=dataset.remove_columns("box") if "captions" in parts else None,
        callbacks=callbacks,
    )


def do_nothing(folder: Path) -> None:
    """Lets a training run to its end."""


def train(kind: str, folder: Path, prepare: Preparation = do_nothing, max_steps: int = 8) -> None:
    """Trains to the end, from the newest checkpoint if there is one."""
    torch.set_num_threads(1)
    trainer = make_trainer(kind, folder, prepare(folder), max_steps)
    has_checkpoint = any((folder / "run").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if has_checkpoint else None)
    trainer.save_model(str(folder / "final"))
    torch.save(trainer.optimizer.state_dict(), folder / "final" / "optimizer.pt")


def start(*arguments: Any) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.interruptions"])
    process = context.Process(target=train, args=arguments)
    process.start()
    return process


def outcome(folder: Path) -> str:
    """A digest of the weights and of the optimiser's state at the end."""
    digest = hashlib.sha256((folder / "final" / "model.safetensors").read_bytes())
    states = torch.load(folder / "final" / "optimizer.pt")["state"]
    for number in sorted(states):  # where parameters were frozen at first, the order depends on where a run began
        for name in sorted(states[number]):
            digest.update(torch.as_tensor(states[number][name]).numpy().tobytes())
    return digest.hexdigest()


def train_with_kills(kind: str, folder: Path, kills: Sequence[Preparation]) -> tuple[str, int]:
    """Trains with each of the `kills` in turn, then to the end. Returns the outcome, and how many were killed."""
    killed = 0
    for kill in kills:
        process = start(kind, folder, kill)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it had ended before the moment came
            break
    else:
        process = start(kind, folder)
        process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{kind}: a training that was killed {killed} times ended with {process.exitcode}")
    return outcome(folder), killed


def main() -> None:
    total_kills, equal_ends = 0, 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            begin = time.time()
            expected, _ = train_with_kills(kind, root / "straight", [])
            duration = time.time() - begin
            left = int(sys.argv[1])
            for number in range(1, 1000):
                folder = root / str(number)
                while True:
                    process = start(kind, folder)
                    process.join(random.uniform(0, duration))
                    if process.exitcode is not None or left == 0:
                        process.join()
                        break
                    process.kill()
                    process.join()
                    left -= 1
                    total_kills += 1
                equal_ends += outcome(folder) == expected
                if outcome(folder) != expected:
                    raise SystemExit(f"{kind}: a training that was interrupted ended differently")
                if left == 0:
                    break
        print(f"{kind}: {total_kills} kills so far, {equal_ends} trainings ended bit-equal", flush=True)


if __name__ == "__main__":
    main()
