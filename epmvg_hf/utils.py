"""Sentences for people: which extra a missing library belongs to, and what an error says in a line."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """
    Around imports of `what`: a library that is not installed becomes an `ImportError` with the command that installs
    the extra it belongs to.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:  # one of transformers, which has its own sentence
            raise
        library = error.name.partition(".")[0]
        raise ImportError(f'{what} needs {library}: pip install "epmvg_hf[{extra}]"', name=error.name) from error


def in_short(error: Exception) -> str:
    """What an error says, in one line: some libraries list every tensor of a model."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
