"""`epmvg evaluate`: a model on splits of benchmarks, or on your own data."""

import typer

import epmvg_hf

from ..utils import needs_extra
from .grounder import check_model
from .launcher import launch


def evaluate(context: typer.Context) -> None:
    """Evaluate a model on benchmarks or on your own data, and write a table, all boxes and the worst errors."""
    from ..runs.evaluation_arguments import parse_arguments

    arguments = parse_arguments(context.args, context.command_path)
    check_model(arguments.model)
    launch(context, arguments.num_processes)
    with needs_extra("epmvg evaluate", "train"):
        epmvg_hf.register()
        from ..runs.benchmark_evaluation import run_evaluation
    run_evaluation(arguments)
