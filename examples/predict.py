#!/usr/bin/env python
"""Finds the box of each expression in one image, prints the boxes and draws them.

python examples/predict.py outputs/demo photo.jpg "the man in blue" "the door"
"""

import argparse

import numpy as np
from transformers import pipeline

import epmvg_hf  # noqa: F401 (registers the task)
from epmvg_hf.evaluation.visualization import draw_grid
from epmvg_hf.model.rgb_images import as_rgb, open_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Folder or Hub id of a trained model.")
parser.add_argument("image", help="Image file or URL.")
parser.add_argument("expressions", nargs="+", help="One or more expressions to look for.")
parser.add_argument("--output", default="prediction.png", help="Picture file to write.")
arguments = parser.parse_args()

grounder = pipeline("visual-grounding", model=arguments.model)
image = as_rgb(open_image(arguments.image, upright=True))  # as the pipeline sees it, and gives the boxes
results = grounder(image, arguments.expressions)

boxes = np.array([list(result["box"].values()) for result in results])
for expression, box in zip(arguments.expressions, boxes.round(1).tolist(), strict=True):
    print(f"{expression}: {box}")
draw_grid(arguments.output, [image] * len(boxes), arguments.expressions, boxes)
