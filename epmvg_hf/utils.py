"""Messages: the extra that a missing library belongs to, an error in one line, and a warning that is not for users."""

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """
    Turns the error of an import in its block into one that says how to install the missing library.

    Args:
        what (`str`): the name that needs the import, with which the message begins.
        extra (`str`): the extra of this package that the library belongs to.

    Raises:
        ImportError: a library that the block imports is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:  # raised by transformers, whose message already says what to install
            raise
        library = error.name.partition(".")[0]
        raise ImportError(f'{what} needs {library}: pip install "epmvg_hf[{extra}]"', name=error.name) from error


@contextmanager
def without_enum_warnings() -> Iterator[None]:
    """
    Drops what torch logs in its block about enumerations: importing transformers imports torchao, if it is installed,
    which registers two of them in a way that torch will give up. Users can do nothing about that.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "is an Enum subclass" not in record.getMessage()

    logger = logging.getLogger("torch.utils._pytree")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def in_short(error: Exception) -> str:
    """An error in one line of at most 400 characters, because some libraries list every tensor of a model."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
