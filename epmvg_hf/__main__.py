"""`python -m epmvg_hf` is the command `epmvg`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="epmvg")
