#!/usr/bin/env python
"""Trains and evaluates a visual grounding model, draws its predictions and writes its model card.

accelerate launch examples/run_grounding.py                                 # configs/shapes.yaml, which needs no data
accelerate launch examples/run_grounding.py --learning_rate 3e-4            # the same with another value
accelerate launch examples/run_grounding.py my.yaml --output_dir outputs/my # arguments from a YAML or JSON file
accelerate launch examples/run_grounding.py examples/configs/refcoco.yaml --data_dir DIR    # a recipe

This is the command `epmvg train`, in a form that `accelerate launch` and `torchrun` can start.
"""

import sys
from pathlib import Path

from epmvg_hf.cli import app

DEFAULT_FILE = Path(__file__).parent / "configs" / "shapes.yaml"

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(DEFAULT_FILE), *arguments]
    app(["train", *arguments])
