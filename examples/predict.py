#!/usr/bin/env python
"""One image, one or more expressions -> boxes and a picture.

python examples/predict.py outputs/demo photo.jpg "the man in blue" "the door"
"""

import argparse

import numpy as np
from transformers import pipeline
from transformers.image_utils import load_image

import epmvg_hf  # noqa: F401 (brings the task)
from epmvg_hf.evaluation.visualization import draw_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or Hub name of a trained model")
parser.add_argument("image", help="image file or URL")
parser.add_argument("expressions", nargs="+", help="what to look for")
parser.add_argument("--output", default="prediction.png", help="picture to write")
arguments = parser.parse_args()

grounder = pipeline("visual-grounding", model=arguments.model)
image = load_image(arguments.image)  # upright, as its boxes are
results = grounder(image, arguments.expressions)

boxes = np.array([list(result["box"].values()) for result in results])
for expression, box in zip(arguments.expressions, boxes.round(1).tolist(), strict=True):
    print(f"{expression}: {box}")
draw_grid(arguments.output, [image] * len(boxes), arguments.expressions, boxes)
