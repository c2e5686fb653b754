"""Divides each step's images among processes so that none is repeated and no process is left without one."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch.utils.data import BatchSampler


class EvenShares:
    """
    Batches for several processes, in the order in which accelerate deals them out: for each step one for each process.

    Where the images of an epoch do not fill its last step, accelerate fills it up with images of the beginning, which
    then count twice. Here the processes share what is left; if it is less than one image for each, the step before
    takes it too.

    Args:
        batch_sampler (`BatchSampler`): the batches of one process.
        num_processes (`int`): the number of processes.

    Attributes:
        sampler (`Sampler`): the order of the images; accelerate tells it the epoch.

    Example:

    ```python
    >>> from torch.utils.data import BatchSampler
    >>> from epmvg_hf.training.even_shares import EvenShares

    >>> list(EvenShares(BatchSampler(range(11), batch_size=2, drop_last=False), num_processes=2))
    [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    >>> list(EvenShares(BatchSampler(range(9), batch_size=2, drop_last=False), num_processes=2))
    [[0, 1], [2, 3], [4, 5, 6], [7, 8]]
    ```
    """

    def __init__(self, batch_sampler: BatchSampler, num_processes: int):
        self.sampler = batch_sampler.sampler
        self.step_size = batch_sampler.batch_size * num_processes
        self.num_processes = num_processes
        if len(self) == 0:
            raise ValueError(f"{self._count()} images are fewer than the {num_processes} processes that share them")

    def __len__(self) -> int:
        return self.num_processes * len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start, end in pairwise([*self._starts(), len(order)]):
            yield from (share.tolist() for share in np.array_split(order[start:end], self.num_processes))

    def _count(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # accelerate's samplers have a length, which torch's may lack

    def _starts(self) -> range:
        """Where each step begins. No step has fewer images than there are processes."""
        return range(0, self._count() - self.num_processes + 1, self.step_size)
