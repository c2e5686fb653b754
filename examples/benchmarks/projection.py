#!/usr/bin/env python
"""What the student's operations mean for 8 and 64 GPUs and a billion pairs: see model_cards/SCALING.md.

python examples/benchmarks/projection.py
"""

import json
from functools import partial
from pathlib import Path

import open_clip
import torch
from growth import BASE, infer, make_batch, train
from run import Row, as_markdown
from timing import count_operations

from epmvg_hf import EpmVGConfig, EpmVGForVisualGrounding

CONFIGS = Path(__file__).parents[1] / "configs"

# What a projection to GPUs takes for granted. The first is the data sheet's number for a dense bfloat16 product on an
# H100. The others are guesses, which measurements on the hardware at hand should replace.
ASSUMED = {
    "TFLOP/s of a GPU": 989,
    "share of them that a step uses": 0.3,
    "GB/s between GPUs of a machine": 100,
    "GB/s between machines, a GPU": 25,
    "pictures a GPU and step": 64,
    "pairs": 1e9,
}


def count() -> dict[str, float]:
    """
    Operations and parameters of the model of configs/epmvg.json and of its recipes' teacher, and the space of its
    cache. A multiplication and an addition are two operations; only matrix products and convolutions count.
    """
    settings = json.loads((CONFIGS / "epmvg.json").read_text())
    model = EpmVGForVisualGrounding(EpmVGConfig(**settings))
    sizes = {**BASE, "picture size (pixels)": settings["image_size"], "text length (tokens)": 20}
    one, two = (make_batch({**sizes, "expressions a picture": expressions}) for expressions in (1, 2))
    forward, forward_two = (count_operations(partial(infer, model, batch)) for batch in (one, two))
    step, step_two = (count_operations(partial(train, model, batch)) for batch in (one, two))
    clip = open_clip.create_model("ViT-B-16")
    patches, width = (224 // 16) ** 2, 512
    return {
        "GFLOP forward, a picture": (2 * forward - forward_two) / 1e9,
        "GFLOP forward, an expression": (forward_two - forward) / 1e9,
        "GFLOP forward and backward, a picture": (2 * step - step_two) / 1e9,
        "GFLOP forward and backward, an expression": (step_two - step) / 1e9,
        "GFLOP of the teacher, a picture": count_operations(lambda: clip.encode_image(torch.rand(1, 3, 224, 224)))
        / 1e9,
        "GFLOP of the teacher, an expression": count_operations(lambda: clip.encode_text(torch.ones(1, 77).long()))
        / 1e9,
        "million parameters": model.num_parameters() / 1e6,
        "kB of the teacher's cache, a picture": 2 * width * (patches + 1) / 1e3,
        "kB of the teacher's cache, an expression": 2 * width / 1e3,
    }


def project(counts: dict[str, float], gpus: int, expressions: int) -> dict[str, float]:
    """What the counts and the assumptions of `ASSUMED` give for these GPUs and expressions a picture."""
    pictures = ASSUMED["pictures a GPU and step"]
    student, teacher = (
        pictures
        * (counts[f"GFLOP {of}, a picture"] + expressions * counts[f"GFLOP {of}, an expression"])
        / (ASSUMED["TFLOP/s of a GPU"] * ASSUMED["share of them that a step uses"])  # GFLOP over TFLOP/s: milliseconds
        for of in ("forward and backward", "of the teacher")
    )
    bandwidth = ASSUMED["GB/s between GPUs of a machine" if gpus <= 8 else "GB/s between machines, a GPU"]
    # Each GPU sends and receives its float32 gradients nearly twice. A million floats over GB/s: milliseconds.
    reduced = 2 * (gpus - 1) / gpus * 4 * counts["million parameters"] / bandwidth
    waiting = max(0.0, reduced - student * 2 / 3)  # DDP reduces during the backward pass, two thirds of the operations
    steps = ASSUMED["pairs"] / expressions / (gpus * pictures)
    return {
        "GPUs": gpus,
        "expressions a picture": expressions,
        "operations (ms)": student,
        "all-reduce (ms)": reduced,
        "of it not hidden (ms)": waiting,
        "teacher (ms)": teacher,
        "hours, cached teacher": steps * (student + waiting) / 3.6e6,
        "hours, teacher in every step": steps * (student + waiting + teacher) / 3.6e6,
        "pictures a second": 1e3 * gpus * pictures / (student + waiting + teacher),
    }


def main() -> None:
    counts = count()
    parts: dict[str, list[Row]] = {
        "assumed and counted": [{"what": what, "value": value} for what, value in (ASSUMED | counts).items()],
        "projected": [project(counts, gpus, expressions) for gpus in (8, 64) for expressions in (1, 8)],
    }
    print(as_markdown({"command": "python examples/benchmarks/projection.py"}, parts))


if __name__ == "__main__":
    main()
