"""Random draws about an image that depend on nothing but the seed, the epoch and the image."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RowDraws:
    """
    Gives what is drawn for an image, such as its augmentation, random states of its own. A run that is resumed within
    an epoch then draws what it would have drawn without the interruption, and the number of workers of a data loader
    makes no difference. It can be sent to these workers, which see the epoch change.

    Args:
        seed (`int`): the seed of the training.

    Example:

    ```python
    >>> import random
    >>> from epmvg_hf.training.row_draws import RowDraws

    >>> draws, drawn = RowDraws(seed=0), []
    >>> for row in (7, 8, 7):
    ...     with draws.of(row):
    ...         drawn.append(random.random())
    >>> drawn[0] == drawn[2] != drawn[1]
    True
    ```
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0, from which the draws follow."""
        self._epoch.fill_(epoch)

    @contextmanager
    def of(self, row: int) -> Iterator[None]:
        """
        A context with the random states of Python, NumPy and PyTorch that belong to a row in this epoch. Those outside
        of it stay as they are.

        Args:
            row (`int`): the number of the row, or of the first row of an image.
        """
        python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        # Numbers of 32 bits, all that NumPy takes. Seeds that follow each other have nothing in common.
        state = np.random.SeedSequence([self.seed, int(self._epoch.item()), row]).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))
        torch.random.default_generator.manual_seed(int(state[2]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(pytorch)
