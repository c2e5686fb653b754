"""The command `epmvg`: its commands, and errors in one line."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .commands.check_data import check_data
from .commands.convert import convert
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.exclude_images import exclude_images
from .commands.export import export
from .commands.ground import ground
from .commands.info import info
from .commands.train import train
from .utils import in_short

# Commands of which nobody expects that `| head` ends them.
LONG = ("train", "evaluate")


class ShortErrors(TyperGroup):
    """Shows an error that the user can mend as one line, unless there is `--debug`."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe has seen enough; typer knows what to do
            if ctx.invoked_subcommand in LONG:
                typer.echo(f"Error: {ctx.invoked_subcommand} stopped, because its output was closed", err=True)
            raise
        except (ImportError, OSError, ValueError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"Error: {in_short(error)}", err=True)
            raise typer.Exit(1) from error


# Without rich, an error is one line, and the lines of an example stay apart.
app = typer.Typer(cls=ShortErrors, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (ground, demo, convert, export, check_data, exclude_images, info):
    app.command()(command)
# What typer does not know is an argument of the training, or of the evaluation, which has its own help.
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=PASSES_ON)(train)
app.command(context_settings=PASSES_ON, add_help_option=False)(evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"epmvg_hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Visual grounding: give an image and an expression, and get the box that the expression means."""
