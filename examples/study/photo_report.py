#!/usr/bin/env python
"""Tables and plots of the finished runs of photos.py.

python examples/study/photo_report.py outputs/photo_study model_cards/distillation-study
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from photos import HALVES, SETTINGS
from report import Results, accuracy_table, gap_table, markdown, plot_accuracy, table_of_runs

CONTROL = "box_map"

# The line of each setting whose accuracy during training is shown.
CURVES = {CONTROL: "--", "first_then_map": "-", "averaged": ":"}

# What is measured of the two modalities before fusion.
MEASURES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "distance of the centroids": lambda gap: gap["gap"],
    "cosine of matching pairs beyond that of others": lambda gap: gap["alignment"] - gap["mismatch"],
    "accuracy of the linear probe": lambda gap: gap["probe"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="--output_dir of photos.py")
    parser.add_argument("output_dir", type=Path, help="folder for photos.md and the plots")
    parser.add_argument("--evaluated_on", choices=["validation", "held_back"], default="validation")
    arguments = parser.parse_args()
    halves = {half: load_results(arguments.runs / f"{half}-{arguments.evaluated_on}") for half in HALVES}
    halves = {half: results for half, results in halves.items() if results}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    report = "\n\n".join(part for half, results in halves.items() for part in sections(half, results))
    teacher = arguments.runs / f"teacher-{arguments.evaluated_on}.json"
    if teacher.exists():
        report += "\n\n" + teacher_section(digits(json.loads(teacher.read_text())["right"]), halves)
    report += "\n\n" + correlation_section(halves) + "\n"
    (arguments.output_dir / "photos.md").write_text(report)
    plot_both_halves(arguments.output_dir / "photos.png", halves)
    plot_gap(arguments.output_dir / "gap.png", halves)
    plot_curves(arguments.output_dir / "curve.png", halves)
    print(report)


def load_results(folder: Path) -> Results:
    results = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        results[run["setting"], run["labelled"]].append(run)
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in results.items()}


def descriptions_of(results: Results) -> dict[str, str]:
    """The settings of which there are runs, in the order of the study."""
    return {name: setting.description for name, setting in SETTINGS.items() if any(name == key[0] for key in results)}


def labels_of(results: Results) -> list[int]:
    return sorted({labelled for _, labelled in results})


def sections(half: str, results: Results) -> list[str]:
    descriptions, labelled = descriptions_of(results), labels_of(results)
    return [
        f"## Towers {half}",
        "Acc@0.5, mean ± standard deviation over seeds (number of seeds):",
        accuracy_table(descriptions, labelled, results),
        f"Points more than '{SETTINGS[CONTROL].description}' of the same seed, mean ± standard deviation:",
        difference_table(descriptions, labelled, results),
        "Each run, by seed:",
        table_of_runs(descriptions, labelled, results),
        *(
            part
            for count in labelled
            for part in (
                f"Modality gap, {count:,} labelled photos, mean over seeds (before -> after training):",
                gap_table(descriptions, count, results),
            )
        ),
    ]


def difference_table(descriptions: Mapping[str, str], labelled: Sequence[int], results: Results) -> str:
    rows = []
    for name, description in descriptions.items():
        cells = []
        for count in labelled:
            control = {run["seed"]: run["acc@0.5"] for run in results.get((CONTROL, count), [])}
            runs = [run for run in results.get((name, count), []) if run["seed"] in control]
            points = [100 * (run["acc@0.5"] - control[run["seed"]]) for run in runs]
            spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
            cells.append(f"{statistics.mean(points):+.1f}{spread}" if points and name != CONTROL else "-")
        rows.append([description, *cells])
    return markdown(["setting", *(f"{count:,} labelled" for count in labelled)], rows)


def digits(right: str) -> np.ndarray:
    return np.array(list(right)) == "1"


def teacher_section(teacher: np.ndarray, halves: Mapping[str, Results]) -> str:
    """What the teacher knows and boxes do not teach: how often a setting is right where its drawn boxes are or not."""
    rows = []
    for half, results in halves.items():
        for (name, labelled), runs in results.items():
            # The first runs of the study did not keep which rows they had right.
            kept = [digits(run["right"]) for run in runs if "right" in run]
            if not kept:
                continue
            # Over the rows of all seeds together, where one seed alone may have none of them.
            right, teachers = np.concatenate(kept), np.tile(teacher, len(kept))
            chosen = (right[teachers], right[~teachers], teachers[~right])
            cells = (f"{part.mean():.1%}" if part.size else "-" for part in chosen)
            rows.append([SETTINGS[name].description, half, f"{labelled:,}", *cells, str(len(kept))])
    header = [
        "setting",
        "towers",
        "labelled",
        "right where the teacher is",
        "right where it is wrong",
        "the teacher is right where the setting is wrong",
        "seeds",
    ]
    title = f"The teacher draws a right box for {teacher.mean():.1%} of the phrases (`add_teacher_boxes`)."
    return f"## What the teacher knows\n\n{title}\n\n{markdown(header, rows)}"


def correlation_section(halves: Mapping[str, Results]) -> str:
    """Whether a smaller gap goes with more accuracy: over all runs, and among runs of equal labels and towers."""
    rows = []
    for title, measure in MEASURES.items():
        groups = [
            np.array([[measure(run["gap_after"]["tokens"]), run["acc@0.5"]] for run in same])
            for results in halves.values()
            for count in labels_of(results)
            if len(same := [run for key, runs in results.items() if key[1] == count for run in runs]) > 2
        ]
        if groups:
            within = np.concatenate([group - group.mean(0) for group in groups])
            rows.append([title, *(correlation(pairs) for pairs in (np.concatenate(groups), within))])
    header = ["in the space before fusion", "all runs", "within equal towers and labels"]
    title = "Correlation (Pearson) of the gap after training with Acc@0.5 over runs, with its 95 % interval:"
    return f"## The gap and the accuracy\n\n{title}\n\n{markdown(header, rows)}"


def correlation(pairs: np.ndarray) -> str:
    """The correlation of `pairs` (runs, 2), and the interval of 95 % of 10,000 bootstraps over runs."""
    generator = np.random.default_rng(0)
    if np.isclose(pairs.std(0), 0).any():
        return "-"
    drawn = pairs[generator.integers(0, len(pairs), (10_000, len(pairs)))]
    drawn = drawn - drawn.mean(1, keepdims=True)
    x, y = drawn[..., 0], drawn[..., 1]
    with np.errstate(invalid="ignore"):  # a bootstrap in which all runs have the same gap has no correlation
        values = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return f"{np.corrcoef(pairs.T)[0, 1]:+.2f} ({low:+.2f} to {high:+.2f}; {len(pairs)} runs)"


def plot_both_halves(file: Path, halves: Mapping[str, Results]) -> None:
    figure, axes = plt.subplots(1, len(halves), figsize=(6 * len(halves) + 3, 5), sharey=True, squeeze=False)
    for axis, (half, results) in zip(axes[0], halves.items(), strict=True):
        labelled = [count for count in labels_of(results) if count > 0]
        plot_accuracy(axis, descriptions_of(results), labelled, results, "photos")
        axis.set_title(f"towers {half}")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot_gap(file: Path, halves: Mapping[str, Results]) -> None:
    """Two measures of the gap after training (columns) over accuracy, one point for each run; a row for each half."""
    shown = list(MEASURES.items())[:2]
    figure, axes = plt.subplots(len(halves), 2, figsize=(12, 5 * len(halves)), sharey="row", squeeze=False)
    for row, (half, results) in zip(axes, halves.items(), strict=True):
        for axis, (title, measure) in zip(row, shown, strict=True):
            for color, count in zip(matplotlib.color_sequences["tab10"], labels_of(results), strict=False):
                for teacher, marker in ((False, "o"), (True, "^")):
                    points = [
                        (measure(run["gap_after"]["tokens"]), run["acc@0.5"])
                        for (name, labelled), runs in results.items()
                        if labelled == count and bool(SETTINGS[name].terms or SETTINGS[name].first) == teacher
                        for run in runs
                    ]
                    if points:
                        label = f"{count:,} labelled photos, {'with' if teacher else 'without'} teacher"
                        axis.scatter(*zip(*points, strict=True), color=color, marker=marker, label=label, alpha=0.8)
            axis.set(title=f"towers {half}", xlabel=f"{title}, before fusion")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("Acc@0.5")
        row[1].legend(fontsize=8)
    figure.savefig(file, dpi=90, bbox_inches="tight")
    plt.close(figure)


def plot_curves(file: Path, halves: Mapping[str, Results]) -> None:
    """Acc@0.5 of the first validation rows during training, of one seed."""
    figure, axes = plt.subplots(1, len(halves), figsize=(6 * len(halves), 5), sharey=True, squeeze=False)
    for axis, (half, results) in zip(axes[0], halves.items(), strict=True):
        for name, style in CURVES.items():
            for color, count in zip(matplotlib.color_sequences["tab10"], labels_of(results), strict=False):
                runs: Sequence[Mapping[str, Any]] = results.get((name, count), [])
                log = [entry for entry in runs[0]["log"] if "eval_acc@0.5" in entry] if runs else []
                if log:
                    label = f"{SETTINGS[name].description}, {count:,} photos"
                    steps, accuracies = [e["step"] for e in log], [e["eval_acc@0.5"] for e in log]
                    axis.plot(steps, accuracies, style, color=color, marker=".", label=label)
        axis.set(title=f"towers {half}", xlabel="optimiser step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0, 0].set_ylabel("Acc@0.5, first 800 rows")
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
