"""How time and memory grow with the sizes of inputs and data, with the number of processes, and from step to step.

The model is that of configs/tiny.json. `growth.png` has the curves, and the report says of three claims whether they
hold: nothing is quadratic in the rows of a dataset, a training starts in under 10 seconds, and no memory is lost from
step to step. Against the sizes of a batch, inference and a training step are measured, also with the same expressions
as pairs, each with its own picture; their memory is that of tensors, without the model's own. `growing_training.py`
measures against rows, steps and processes.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import growing_training
import numpy as np
import torch
from growing_training import Point
from matplotlib.figure import Figure
from timing import take_turns
from torch.profiler import ProfilerActivity, profile

from epmvg_hf import EpmVGConfig, EpmVGForVisualGrounding

CONFIGS = Path(__file__).parents[1] / "configs"

# The sizes of each curve. While one of them varies, the others have their values in BASE.
AXES = {
    "expressions a picture": [1, 2, 4, 8, 16, 32, 64],
    "picture size (pixels)": [224, 320, 448, 640, 896, 1280],
    "text length (tokens)": [4, 8, 16, 32, 64, 128, 256],
    "pictures a batch": [1, 2, 4, 8, 16, 32],
}
BASE = {"expressions a picture": 4, "picture size (pixels)": 224, "text length (tokens)": 16, "pictures a batch": 1}
# A quadratic cost has the exponent 2 and n log n about 1.1 here. The limits leave room for a busy machine.
MOST_EXPONENT = 1.3
MOST_SECONDS_TO_START = 10.0
# Two kilobytes a step are 2 GB in a million steps. The allocator's own noise over 1,500 steps is below that.
MOST_BYTES_A_STEP = 2_000.0
MOST_OBJECTS_A_STEP = 0.1


@dataclass
class Check:
    """A claim, the measured number, and the limit that it must not exceed."""

    claim: str
    measured: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.limit


def measure(device: torch.device, quick: bool, output: Path) -> list[dict[str, Any]]:
    """Measures everything, draws `growth.png` in the output folder and returns the points and the claims."""
    points = measure_inputs(device, quick)
    with tempfile.TemporaryDirectory() as folder:
        rows = growing_training.measure_rows(Path(folder), quick)
        steps, slopes = growing_training.measure_leak(Path(folder), quick)
        processes = growing_training.measure_processes(Path(folder), quick)
    draw(output / "growth.png", [*points, *rows, *steps, *processes])
    checks = [
        *check_rows(rows),
        Check("bytes more a step", slopes[0], MOST_BYTES_A_STEP),
        Check("objects more a step", slopes[1], MOST_OBJECTS_A_STEP),
    ]
    claims = [{**asdict(check), "holds": "yes" if check.holds else "no"} for check in checks]
    return [*(asdict(point) for point in [*points, *rows, *processes]), *claims]


def peak_memory(action: Callable[[], object], device: torch.device) -> float:
    """Megabytes of tensors that an action needs at most, beyond those in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # The memory of the process would not do: what the allocator kept from an earlier action, it would not take again.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return np.cumsum([0, *changes]).max() / 1e6


def measure_inputs(device: torch.device, quick: bool) -> list[Point]:
    """Inference and a training step for each value of each axis."""
    points = []
    for axis, sizes in AXES.items():
        for size in sizes[:2] if quick else sizes:
            values = {**BASE, axis: size}
            model = make_student(values["picture size (pixels)"], values["text length (tokens)"]).to(device)
            batch = {name: tensor.to(device) for name, tensor in make_batch(values).items()}
            actions = {"inference": partial(infer, model, batch), "training step": partial(train, model, batch)}
            if axis == "expressions a picture":
                pairs = make_batch({**values, axis: 1, "pictures a batch": size})
                actions["inference, as pairs"] = partial(infer, model, {k: v.to(device) for k, v in pairs.items()})
            megabytes = {what: peak_memory(action, device) for what, action in actions.items()}  # which also warms up
            seconds = take_turns(actions, device, repeats=1 if quick else 3)
            points += [Point(axis, size, what, seconds[what], megabytes[what]) for what in actions]
    return points


@torch.inference_mode()
def infer(model: EpmVGForVisualGrounding, batch: dict[str, torch.Tensor]) -> None:
    model.eval()(**{name: tensor for name, tensor in batch.items() if name != "labels"})


def train(model: EpmVGForVisualGrounding, batch: dict[str, torch.Tensor]) -> None:
    model.train()(**batch).loss.backward()
    model.zero_grad()


def make_student(image_size: int, max_text_length: int) -> EpmVGForVisualGrounding:
    """The demo's model with random weights, for pictures and texts of these sizes."""
    settings = json.loads((CONFIGS / "tiny.json").read_text())
    settings["text_config"]["max_position_embeddings"] = max_text_length
    torch.manual_seed(0)
    return EpmVGForVisualGrounding(
        EpmVGConfig(**{**settings, "image_size": image_size, "max_text_length": max_text_length})
    )


def make_batch(values: dict[str, int]) -> dict[str, torch.Tensor]:
    """Random inputs without padding, with labels."""
    pictures, side = values["pictures a batch"], values["picture size (pixels)"]
    expressions, length = pictures * values["expressions a picture"], values["text length (tokens)"]
    return {
        "pixel_values": torch.randn(pictures, 3, side, side),
        "pixel_mask": torch.ones(pictures, side, side, dtype=torch.long),
        "input_ids": torch.randint(5, 1000, (expressions, length)),
        "attention_mask": torch.ones(expressions, length, dtype=torch.long),
        "image_index": torch.arange(pictures).repeat_interleave(values["expressions a picture"]),
        "labels": torch.tensor([0.5, 0.5, 0.4, 0.2]).repeat(expressions, 1),
    }


def check_rows(points: list[Point]) -> list[Check]:
    """The claims on the start of a training."""
    by_what: dict[str, list[Point]] = {}
    for point in points:
        if not point.what.startswith("100 batches"):  # whose number of rows is always the same
            by_what.setdefault(point.what, []).append(point)
    checks = [Check(f"exponent of rows: {what}", exponent(of), MOST_EXPONENT) for what, of in by_what.items()]
    last = by_what["start, to the first batch"][-1]
    assert last.seconds is not None
    return [*checks, Check(f"seconds to the first batch of {last.size:,} rows", last.seconds, MOST_SECONDS_TO_START)]


def exponent(points: list[Point]) -> float:
    """
    The p of seconds = c * rows ** p, fitted to the logarithms of the upper half of the sizes: below, the constant
    costs of a start would hide how the rest grows.
    """
    largest = points[len(points) // 2 :] if len(points) > 2 else points
    sizes, seconds = zip(*((point.size, point.seconds) for point in largest), strict=True)
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def draw(path: Path, points: list[Point]) -> None:
    """Two rows of panels: time and memory of each axis. What is measured has one colour in both."""
    axes = list(dict.fromkeys(point.axis for point in points))
    figure = Figure(figsize=(3.2 * len(axes), 6), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for axis, column in zip(axes, panels.T, strict=True):
        of_axis = [point for point in points if point.axis == axis]
        for panel, unit in zip(column, ("seconds", "megabytes"), strict=True):
            for number, what in enumerate(dict.fromkeys(point.what for point in of_axis)):
                # A logarithmic axis cannot show the zero of a memory that was there already.
                curve = [
                    (point.size, value) for point in of_axis if point.what == what and (value := getattr(point, unit))
                ]
                if curve:
                    marker = "." if len(curve) < 10 else ""
                    panel.plot(*zip(*curve, strict=True), marker=marker, label=what, color=f"C{number}")
            if axis == "processes":
                panel.set_xticks([point.size for point in of_axis])
                panel.set_ylim(bottom=0)
            elif axis != "step":
                panel.set_xscale("log", base=10 if axis == "rows" else 2)
                panel.set_yscale("log" if unit == "seconds" or axis == "rows" else "linear")
            panel.set(xlabel=axis, ylabel=unit)
            panel.grid(alpha=0.3)
            panel.set_visible(panel.has_data())
        column[0 if column[0].has_data() else 1].legend(fontsize=6)
    figure.savefig(path, dpi=110)
