"""Tables and plots of runs over several seeds, as both studies write them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

# The runs of each setting with each number of labels: `results[setting, labelled]`.
Results = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Writes the result of a run, of which a killed run leaves nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".tmp").replace(file)


def accuracy_table(descriptions: Mapping[str, str], labelled: Sequence[int], results: Results) -> str:
    """The mean Acc@0.5 of each setting (rows) with each number of labels (columns)."""
    rows = [
        [description, *(cell([run["acc@0.5"] for run in results.get((name, count), [])]) for count in labelled)]
        for name, description in descriptions.items()
    ]
    return markdown(["setting", *(f"{count:,} labelled" for count in labelled)], rows)


def table_of_runs(descriptions: Mapping[str, str], labelled: Sequence[int], results: Results) -> str:
    """Acc@0.5 and seconds of each run."""

    def by_seed(runs: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(f"{run['seed']}: {run['acc@0.5']:.3f} ({run['seconds']} s)" for run in runs)

    rows = [
        [description, *(by_seed(results.get((name, count), [])) for count in labelled)]
        for name, description in descriptions.items()
    ]
    return markdown(["setting", *(f"{count:,} labelled" for count in labelled)], rows)


def gap_table(descriptions: Mapping[str, str], labelled: int, results: Results) -> str:
    """The modality gap before and after training with one number of labels, mean over seeds."""
    measures = {
        "gap": "distance of centroids",
        "alignment": "matching pairs",
        "mismatch": "mismatched pairs",
        "probe": "linear probe",
    }
    rows = []
    for name, description in descriptions.items():
        runs = results.get((name, labelled), [])
        for space in runs[0]["gap_after"] if runs else ():
            cells = []
            for measure in measures:
                before, after = (
                    statistics.mean(run[when][space][measure] for run in runs)
                    if measure in runs[0][when][space]
                    else None
                    for when in ("gap_before", "gap_after")
                )
                cells.append("-" if before is None else f"{before:.2f} -> {after:.2f}")
            rows.append([description, space.replace("_", " "), *cells])
    return markdown(["setting", "space", *measures.values()], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def cell(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds, and the number of seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation} ({len(values)})"


def plot_accuracy(
    axis: plt.Axes, descriptions: Mapping[str, str], labelled: Sequence[int], results: Results, unit: str
) -> None:
    """Draws Acc@0.5 over the number of labels, one line for each setting with the deviation over seeds."""
    axis.set_prop_cycle(color=matplotlib.color_sequences["tab20"])
    for position, (name, description) in enumerate(descriptions.items()):
        runs = [(count, [run["acc@0.5"] for run in results.get((name, count), [])]) for count in labelled]
        runs = [(count, values) for count, values in runs if values]
        if runs:
            counts, means = zip(*((count, statistics.mean(values)) for count, values in runs), strict=True)
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in runs]
            beside = np.array(counts) * 1.02**position  # shifted, so that error bars do not hide each other
            axis.errorbar(beside, means, spread, label=description, marker="o", markersize=4, capsize=2)
    axis.set(xscale="log", xlabel=f"labelled {unit}", ylabel="Acc@0.5")
    axis.set_xticks(labelled, [f"{count:,}" for count in labelled])
    axis.grid(alpha=0.3)
