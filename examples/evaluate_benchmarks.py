#!/usr/bin/env python
"""Evaluates a model on all splits of one or more benchmarks, and writes Acc@0.5 and more as one table.

accelerate launch examples/evaluate_benchmarks.py outputs/demo --benchmarks shapes
accelerate launch examples/evaluate_benchmarks.py MODEL --benchmarks refcoco=DIR gref_umd=DIR flickr30k_entities=DIR
accelerate launch examples/evaluate_benchmarks.py MODEL --benchmarks custom=DIR --splits test --box_format xyxy

This is the command `epmvg evaluate`, whose `--help` says more, in a form that `accelerate launch` and `torchrun` can
start. It is not called evaluate.py, because that would hide the library of that name, which it uses.
"""

import sys

from epmvg_hf.cli import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]], prog_name="epmvg")
