"""`python -m epmvg_hf` is the command `epmvg`."""

from .cli import app

app(prog_name="epmvg")
