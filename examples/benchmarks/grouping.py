#!/usr/bin/env python
"""Time of a batch as B images with k expressions each, against B * k pairs of an image and an expression.

The boxes of both must agree.

python examples/benchmarks/grouping.py                       # random weights of TransVG's size
python examples/benchmarks/grouping.py --model outputs/demo
"""

import argparse
import time

import torch
from PIL import Image
from transformers import BatchFeature, BertTokenizer

from epmvg_hf import EpmVGConfig, EpmVGForVisualGrounding, EpmVGImageProcessor, EpmVGProcessor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or Hub name of a trained model, instead of random weights")
parser.add_argument("--images", type=int, default=2)
parser.add_argument("--expressions", type=int, default=7, help="per image; RefCOCO has about 7")
parser.add_argument("--repeats", type=int, default=5)
arguments = parser.parse_args()

if arguments.model is not None:
    model = EpmVGForVisualGrounding.from_pretrained(arguments.model)
    processor = EpmVGProcessor.from_pretrained(arguments.model)
else:
    torch.manual_seed(0)
    model = EpmVGForVisualGrounding(EpmVGConfig())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "man", "in", "blue", *map(str, range(10))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    processor = EpmVGProcessor(EpmVGImageProcessor(), tokenizer)
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
model = model.eval().to(device)

generator = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (arguments.images, 480, 640, 3), dtype=torch.uint8, generator=generator)
images = [Image.fromarray(image.numpy()) for image in pixels]
expressions = [[f"the man in blue {k}" for k in range(arguments.expressions)] for _ in images]

grouped = processor(images=images, text=expressions, return_tensors="pt").to(device)
pairs = processor(
    images=[image for image in images for _ in range(arguments.expressions)],
    text=[expression for group in expressions for expression in group],
    return_tensors="pt",
).to(device)


@torch.no_grad()
def measure(inputs: BatchFeature) -> tuple[torch.Tensor, float]:
    boxes = model(**inputs).pred_boxes.cpu()  # also warms up
    started = time.perf_counter()
    for _ in range(arguments.repeats):
        model(**inputs).pred_boxes.cpu()
    return boxes, (time.perf_counter() - started) / arguments.repeats


grouped_boxes, grouped_seconds = measure(grouped)
pair_boxes, pair_seconds = measure(pairs)
count = len(pair_boxes)
print(f"{arguments.images} images x {arguments.expressions} expressions on {device}")
print(f"grouped: {grouped_seconds:.3f} s, {1000 * grouped_seconds / count:.1f} ms per expression")
print(f"pairs:   {pair_seconds:.3f} s, {1000 * pair_seconds / count:.1f} ms per expression")
difference = (grouped_boxes - pair_boxes).abs().max()
print(f"{pair_seconds / grouped_seconds:.1f} times faster, largest difference of a box {difference:.1e}")
