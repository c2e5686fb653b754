"""Times of actions that take turns, and the time that their operations need at least."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

Name = TypeVar("Name")
Action = Callable[[], object]


def seconds_of(action: Action, device: torch.device) -> float:
    """How long an action takes, by the clock of the device."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def take_turns(actions: Mapping[Name, Action], device: torch.device, repeats: int) -> dict[Name, float]:
    """
    The median time of each action in seconds. In each of the repeats all take their turn, so that other work of the
    machine slows down all of them alike. The actions should have run once before.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(repeats), desc="turns"):
        for name, action in actions.items():
            seconds[name].append(seconds_of(action, device))
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def count_operations(action: Action) -> int:
    """
    The floating-point operations of the matrix products and convolutions of an action; a multiplication and an
    addition are two. PyTorch's counter does not know all fused kernels of attention, so attention runs without them.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


class MatrixProduct:
    """A product of two square matrices, large enough to run at the highest speed that the device has for products."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quick: bool):
        self.side = 256 if quick else 8192 if device.type == "cuda" else 2048
        self.left, self.right = (torch.randn(self.side, self.side, device=device, dtype=dtype) for _ in range(2))

    def __call__(self) -> torch.Tensor:
        return self.left @ self.right

    @property
    def operations(self) -> int:
        return 2 * self.side**3
