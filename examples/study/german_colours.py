#!/usr/bin/env python
"""Data to adapt a model of `shapes` to: new scenes whose expressions name colours in German.

python examples/study/german_colours.py outputs/german_colours    # images and a JSON file for each split
"""

import argparse
import json
import re
from pathlib import Path

from epmvg_hf import load_grounding_dataset

WORDS = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "lila",
    "orange": "orange",
    "cyan": "türkis",
    "gray": "grau",
}
COLOUR = re.compile(rf"\b({'|'.join(WORDS)})\b")
# Another seed than the demo's, so that no scene is one that the demo is trained or tested on.
SEED = 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="the folder to write")
parser.add_argument(
    "--images", type=int, nargs=3, default=(800, 100, 400), help="of the train, validation and test split"
)
arguments = parser.parse_args()

(arguments.folder / "images").mkdir(parents=True, exist_ok=True)
for split, num_images in zip(("train", "validation", "test"), arguments.images, strict=True):
    with (arguments.folder / f"{split}.jsonl").open("w") as file:
        for row in load_grounding_dataset("shapes", split=split, seed=SEED, num_images=num_images):
            image = f"images/{row['image_id']}.png"
            if not (arguments.folder / image).exists():
                row["image"].save(arguments.folder / image)
            expression = COLOUR.sub(lambda match: WORDS[match[1]], row["expression"])
            file.write(json.dumps({"image": image, "expression": expression, "box": row["box"]}) + "\n")
