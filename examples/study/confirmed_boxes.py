#!/usr/bin/env python
"""How many boxes students of photos.py learn for photos without labels, and how many of these are right.

python examples/study/confirmed_boxes.py --data_dir DIR --labelled 200 --seeds 0 1 2

A box is right if its IoU with the one in the train split, of which the runs knew nothing, is at least 0.5.
"""

import argparse
from pathlib import Path

import numpy as np
from photos import SETTINGS, Run, load_trainable, predicted_boxes
from report import markdown

from epmvg_hf.evaluation.accuracy import paired_iou


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with the files of flickr30k_entities")
    parser.add_argument("--labelled", type=int, default=200, help="labelled photos of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--predictor_steps", type=int, default=800, help="as of the runs")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/photo_study"), help="as of the runs")
    print(table(parser.parse_args()))


def table(arguments: argparse.Namespace) -> str:
    """A row for each setting whose boxes are there, with means over seeds."""
    true = np.array(load_trainable(arguments)["box"][:])
    lines = []
    for name, setting in SETTINGS.items():
        runs = [Run(arguments, name, arguments.labelled, 0, seed) for seed in arguments.seeds if setting.predictor]
        runs = [run for run in runs if run.predictions_file.exists()]
        if not runs:
            continue
        learned = [predicted_boxes(run) for run in runs]
        counts = [len(rows) for rows, _ in learned]
        right = [(paired_iou(boxes, true[rows]) >= 0.5).mean() for rows, boxes in learned]
        lines.append([setting.description, f"{np.mean(counts):,.0f}", f"{np.mean(right):.1%}", str(len(runs))])
    return markdown(["setting", "boxes", "right", "seeds"], lines)


if __name__ == "__main__":
    main()
