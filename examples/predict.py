#!/usr/bin/env python
"""Finds the box of each expression in one image, prints the boxes with their scores, and draws them.

python examples/predict.py MODEL photo.jpg "the man in blue" "the door"
python examples/predict.py MODEL photo.jpg "the man in blue" "a dog" --threshold 0.3   # what is not there has no box
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import pipeline

import epmvg_hf  # noqa: F401 (registers the task)
from epmvg_hf.evaluation.visualization import draw_grid
from epmvg_hf.model.rgb_images import as_rgb, open_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Folder or Hub id of a trained model.")
parser.add_argument("image", help="Image file or URL.")
parser.add_argument("expressions", nargs="+", help="One or more expressions to look for.")
parser.add_argument("--threshold", type=float, default=None, help="Lowest score of a box; by default there is none.")
parser.add_argument("--output", default="prediction.png", help="Picture file to write.")
arguments = parser.parse_args()

grounder = pipeline("visual-grounding", model=arguments.model)
image = as_rgb(open_image(arguments.image, upright=True))  # as the pipeline sees it, and gives the boxes
results = grounder(image, arguments.expressions, threshold=arguments.threshold)

for result in results:
    box = "not found" if result["box"] is None else [round(side, 1) for side in result["box"].values()]
    score = "" if result["score"] is None else f" (score {result['score']:.2f})"
    print(f"{result['text']}: {box}{score}")
found = [result for result in results if result["box"] is not None]
if found:
    boxes = np.array([list(result["box"].values()) for result in found])
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    draw_grid(arguments.output, [image] * len(found), [result["text"] for result in found], boxes)
    print(f"drawn in {arguments.output}")
