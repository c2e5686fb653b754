#!/usr/bin/env python
"""One image, one or more expressions -> boxes and a picture.

python examples/predict.py outputs/demo photo.jpg "the man in blue" "the door"
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageOps

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor
from epmvg_hf.visualization import draw_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or Hub name of a trained model")
parser.add_argument("image", help="image file")
parser.add_argument("expressions", nargs="+", help="what to look for")
parser.add_argument("--output", default="prediction.png", help="picture to write")
arguments = parser.parse_args()

model = EpmVGForVisualGrounding.from_pretrained(arguments.model).eval()
processor = EpmVGProcessor.from_pretrained(arguments.model)

image = ImageOps.exif_transpose(Image.open(arguments.image))  # upright, as `datasets` decodes it
inputs = processor(images=image, text=arguments.expressions, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
results = processor.post_process_grounding(outputs, inputs)

boxes = np.stack([result["box"].numpy() for result in results])
for expression, box in zip(arguments.expressions, boxes.round(1).tolist(), strict=True):
    print(f"{expression}: {box}")
draw_grid(arguments.output, [image] * len(boxes), arguments.expressions, boxes)
