#!/usr/bin/env python
"""All benchmarks: one command, one run, one report as Markdown and JSON.

python examples/benchmarks/run.py                               # the student against its rivals
python examples/benchmarks/run.py --profile                     # and where its time goes
python examples/benchmarks/run.py --device cuda                 # in bfloat16, compiled
python examples/benchmarks/run.py --parts grouping distillation # other parts, see --help
python examples/benchmarks/run.py --parts precision --model outputs/demo
python examples/benchmarks/run.py --parts latency --model model_cards/epmvg-small-flickr30k
python examples/benchmarks/run.py --quick --parts speed latency grouping distillation input growth   # does it all run?

A part is a module of this folder with one function, which `run_parts` calls with what that part needs:

    def measure(device: torch.device, quick: bool, output: Path, ...) -> list[dict[str, Any]]

`quick` asks for tiny models and few repeats, to see that everything runs; `output` is the folder of the report, for
plots and other files. A part that writes none takes no output, one that only knows the CPU takes no device, and
further arguments are the part's own. A row is a measurement: its keys are the columns, its values numbers, text or
None. Rows with other columns than the row before begin a new table.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from epmvg_hf import load_grounding_dataset
from epmvg_hf.training.hardware import choose_compute, choose_threads

PARTS = ("speed", "latency", "grouping", "distillation", "precision", "input", "growth")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Row = dict[str, Any]


def parse_arguments(command_line: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["speed"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder for the report")
    parser.add_argument("--quick", action="store_true", help="tiny models and few repeats, to see that it runs")
    parser.add_argument("--repeats", type=int, help="turns of speed, latency and grouping, and steps of distillation")
    parser.add_argument("--precision", choices=DTYPES, help="of speed; without it, what is fast on the device")
    parser.add_argument("--profile", action="store_true", help="of speed: tables of the student's operations")
    parser.add_argument("--model", help="folder or Hub name of a trained model for latency, precision and grouping")
    parser.add_argument("--images", type=Path, help="folder with JPEGs for input, instead of drawn pictures")
    precision = parser.add_argument_group("data and precisions of the part precision")
    precision.add_argument("--dataset_name", default="shapes")
    precision.add_argument("--data_dir", help="folder with the benchmark's files")
    precision.add_argument("--split", default="test")
    precision.add_argument("--box_format", choices=["xyxy", "xywh"], help="of custom data")
    precision.add_argument("--limit", type=int, help="how many expressions to use, from the first on")
    precision.add_argument("--precisions", nargs="+", default=["bfloat16", "float16", "int8"], help="besides float32")
    arguments = parser.parse_args(command_line)
    if "precision" in arguments.parts and arguments.model is None:
        parser.error("the part precision needs a trained model, such as --model outputs/demo")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}, expected at least 1")
    return arguments


def main(command_line: list[str] | None = None) -> None:
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse_arguments(command_line)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(choose_threads())
    if arguments.precision is None:
        bfloat16 = choose_compute(arguments.device).precision == "bf16"
        arguments.precision = "bfloat16" if bfloat16 else "float32"
    about = describe(arguments, command_line)
    parts = run_parts(arguments)
    report = {"about": about, "parts": parts}
    (arguments.output / "benchmarks.json").write_text(json.dumps(report, indent=1) + "\n")
    text = as_markdown(about, parts)
    (arguments.output / "benchmarks.md").write_text(text)
    print(text)


def describe(arguments: argparse.Namespace, command_line: list[str]) -> dict[str, str]:
    """Where and how the numbers came about."""
    capped = [
        f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ
    ]
    device = " ".join(["CPU with", torch.backends.cpu.get_cpu_capability(), *capped])
    if arguments.device.type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    return {
        "command": shlex.join(["python", "examples/benchmarks/run.py", *command_line]),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "precision of speed": arguments.precision,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
    }


def run_parts(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of each part. A part is only imported if it runs, because some need libraries that others do not."""
    device, quick, output = arguments.device, arguments.quick, arguments.output
    parts: dict[str, list[Row]] = {}
    if "speed" in arguments.parts:
        import speed

        dtype = DTYPES[arguments.precision]
        parts["speed"] = speed.measure(device, quick, output, dtype, arguments.repeats, arguments.profile)
    if "latency" in arguments.parts:
        import latency

        parts["latency"] = latency.measure(device, quick, arguments.model, arguments.repeats)
    if "grouping" in arguments.parts:
        import grouping

        parts["grouping"] = grouping.measure(device, quick, arguments.model, arguments.repeats)
    if "distillation" in arguments.parts:
        import distillation

        parts["distillation"] = distillation.measure(quick, arguments.repeats)
    if "precision" in arguments.parts:
        import precision

        dataset = load_grounding_dataset(
            arguments.dataset_name, arguments.data_dir, arguments.split, box_format=arguments.box_format
        )
        if arguments.limit is not None:
            dataset = dataset.select(range(min(arguments.limit, len(dataset))))
        parts["precision"] = precision.measure(device, arguments.model, dataset, arguments.precisions)
    if "input" in arguments.parts:
        import input

        parts["input"] = input.measure(quick, arguments.images)
    if "growth" in arguments.parts:
        import growth

        parts["growth"] = growth.measure(device, quick, output)
    return parts


def as_markdown(about: dict[str, str], parts: dict[str, list[Row]]) -> str:
    """The report as Markdown. A row with other columns than the row before begins a new table."""
    lines = ["# Benchmarks", "", *(f"* {name}: {value}" for name, value in about.items())]
    for part, rows in parts.items():
        lines += ["", f"## {part}"]
        columns: list[str] = []
        for row in rows:
            if list(row) != columns:
                columns = list(row)
                lines += ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines.append(f"| {' | '.join(as_text(value) for value in row.values())} |")
    return "\n".join(lines) + "\n"


def as_text(value: Any) -> str:
    """Numbers with at least three digits, which is more than a measurement is good for."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
