#!/usr/bin/env python
"""What a training step costs without a teacher, with a cached one, and with one that runs in every step.

python examples/benchmark_distillation.py                       # the demo's model, data and teacher
python examples/benchmark_distillation.py --rounds 5 --threads 1
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from run_grounding import ModelArguments, make_model
from transformers import TrainerCallback

from epmvg_hf import ClipTeacher, EpmVGTrainer, EpmVGTrainingArguments, load_grounding_dataset

HERE = Path(__file__).parent
MODES = ("no teacher", "cached", "on the fly")


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next: data, forward, backward and optimizer."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds(self, warm_up: int) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)][warm_up:]


def chunks(values: list[float], arguments: argparse.Namespace) -> list[list[float]]:
    """The steps of each round."""
    return [values[start : start + arguments.steps] for start in range(0, len(values), arguments.steps)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=f"local-dir:{HERE.parent / 'model_cards' / 'clip-tiny-shapes'}")
    parser.add_argument("--config_name", default="tiny.json", help="model configuration, see run_grounding.py")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=40, help="measured steps of each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each of all modes in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    teacher = ClipTeacher.from_pretrained(arguments.teacher)
    dataset = load_grounding_dataset("shapes", split="train", num_images=arguments.images)
    seconds = {mode: [] for mode in MODES}
    warm_up = 5
    for _ in range(arguments.rounds):
        for mode in MODES:
            torch.manual_seed(0)
            model_arguments = ModelArguments(config_name=arguments.config_name, attn_implementation="eager")
            distils = mode != "no teacher"
            model, processor = make_model(model_arguments, dataset["expression"], None)
            times = StepTimes()
            with tempfile.TemporaryDirectory() as folder:
                args = EpmVGTrainingArguments(
                    output_dir=folder,
                    use_cpu=True,
                    bf16=True,
                    max_steps=warm_up + arguments.steps + 1,
                    per_device_train_batch_size=arguments.batch_size,
                    augment=False,
                    cache_teacher=mode == "cached",
                    save_strategy="no",
                    logging_steps=1_000,
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                )
                EpmVGTrainer(
                    model,
                    args,
                    train_dataset=dataset,
                    processing_class=processor,
                    teacher=teacher if distils else None,
                    callbacks=[times],
                ).train()
            seconds[mode] += times.seconds(warm_up)
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    for mode in MODES:
        # A ratio within each round: what else the machine does changes between rounds.
        ratios = [
            statistics.median(own) / statistics.median(base)
            for own, base in zip(
                chunks(seconds[mode], arguments), chunks(seconds["no teacher"], arguments), strict=True
            )
        ]
        spread = ", ".join(f"{100 * (ratio - 1):+.1f} %" for ratio in ratios)
        print(f"{mode:12} {medians[mode] * 1e3:8.1f} ms a step; beside no teacher, by round: {spread}")
    print(json.dumps({"threads": arguments.threads, "steps": len(seconds["cached"]), **medians}))


if __name__ == "__main__":
    main()
