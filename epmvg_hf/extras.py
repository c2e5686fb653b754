"""One sentence where an optional library is missing."""

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
