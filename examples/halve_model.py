#!/usr/bin/env python
"""Copies a trained model with its weights in half precision, which takes half the space on disk and on the Hub.

python examples/halve_model.py outputs/mine model_cards/mine

The copy has the processor and the card, too. It loads as float32 like the original, with weights that were rounded to
float16. What that does to the accuracy of your model, `evaluate_benchmarks.py` says.
"""

import argparse
import shutil
from pathlib import Path

import torch

from epmvg_hf import EpmVGForVisualGrounding, EpmVGProcessor


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Folder of a trained model.")
    parser.add_argument("output_dir", type=Path, help="New folder for the copy.")
    arguments = parser.parse_args(command_line)
    model = EpmVGForVisualGrounding.from_pretrained(arguments.model, dtype=torch.float32)
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight.half()
            if not weights[name].isfinite().all():
                raise SystemExit(f"halve_model.py: error: {name} has numbers that float16 cannot hold")
    model.save_pretrained(arguments.output_dir, state_dict=weights)  # the config still says float32
    EpmVGProcessor.from_pretrained(arguments.model).save_pretrained(arguments.output_dir)
    card = arguments.model / "README.md"
    if card.is_file():
        shutil.copyfile(card, arguments.output_dir / "README.md")
    size = sum(file.stat().st_size for file in arguments.output_dir.iterdir())
    print(f"{arguments.output_dir}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
