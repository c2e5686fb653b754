"""Progress bars of `datasets`, which writes them into log files as well."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def bars_only_on_a_terminal() -> Iterator[None]:
    """
    Hides the progress bars of `datasets` in its block if they would be written to a file: a line per thousand rows.

    What the user has set, by `disable_progress_bars` or by `HF_DATASETS_DISABLE_PROGRESS_BARS`, is as before
    afterwards. If that variable says that bars are to be shown, they are.
    """
    hide = (
        not sys.stderr.isatty()
        and not datasets.are_progress_bars_disabled()
        and datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
    )
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
