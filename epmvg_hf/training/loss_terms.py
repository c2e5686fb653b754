"""Averages the named terms of the loss between two lines of the log."""

import torch
from accelerate import Accelerator


class LossTerms:
    """
    The mean of each loss term over the expressions of all processes since the last call of [`LossTerms.take`]. The
    sums stay on the device, so that adding a term does not wait for it.

    Args:
        accelerator (`Accelerator`): connects the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, terms: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds terms, each with the number of this process's expressions that it is a mean of, on the same device."""
        for name, (term, count) in terms.items():
            weighted = torch.stack([term.detach().float() * count, count.float()])
            self._sums[name] = self._sums.get(name, 0) + weighted

    def take(self) -> dict[str, float]:
        """Returns the means, without terms that no expression contributed to, and starts counting again."""
        means = {}
        for name, weighted in self._sums.items():
            total, count = self.accelerator.reduce(weighted, reduction="sum").tolist()
            if count:
                means[name] = total / count
        self._sums = {}
        return means
