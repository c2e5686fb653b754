"""What a machine computes fast: precision, attention and threads, where a user leaves the choice open."""

import os
import time
from dataclasses import dataclass

import psutil
import torch

# Share of a float32 product's time below which bfloat16 is worth its rounding. Processors with bfloat16 instructions
# take about a half, those that emulate them take ten to a hundred times as long, so the exact value hardly matters.
_WORTHWHILE = 0.8
_PROBE_SIZE = 256  # float32 needs a millisecond for it, and emulated bfloat16 at most a few tenths of a second


@dataclass(frozen=True)
class ComputeChoice:
    """
    How to compute on a device.

    Args:
        precision (`str`): `"bf16"` or `"no"`, which is float32.
        attn_implementation (`str` or `None`): `"eager"`, or `None` for what transformers chooses.
        reason (`str`): why, for the log.

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.training.hardware import choose_compute

    >>> choice = choose_compute(torch.device("cpu"))
    >>> choice.precision in ("bf16", "no"), "bfloat16" in choice.reason
    (True, True)
    ```
    """

    precision: str
    attn_implementation: str | None
    reason: str


def choose_compute(device: torch.device) -> ComputeChoice:
    """
    The precision and attention that are fast on a device. A CPU is asked by a short measurement, because its name and
    flags do not tell what PyTorch makes of them.

    Args:
        device (`torch.device`): where the model will run.

    Returns:
        [`ComputeChoice`]

    Example:

    ```python
    >>> import torch
    >>> from epmvg_hf.training.hardware import choose_compute

    >>> choose_compute(torch.device("meta")).precision  # nothing is known of other devices
    'no'
    ```
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ComputeChoice("bf16", None, f"{torch.cuda.get_device_name(device)} has bfloat16 instructions")
        return ComputeChoice("no", None, f"{torch.cuda.get_device_name(device)} has no bfloat16 instructions")
    if device.type == "cpu":
        share = _bfloat16_share()
        reason = f"a bfloat16 product takes {share:.2g} times as long as a float32 one on this CPU"
        if share < _WORTHWHILE:
            # Measured with the model of `make demo`: in bfloat16, PyTorch's fused attention makes a training step 1.6
            # times as long as eager attention does. In float32 the fused one is slightly faster.
            return ComputeChoice("bf16", "eager", reason)
        return ComputeChoice("no", None, reason)
    return ComputeChoice("no", None, f"nothing was measured on {device.type}, so float32, not bfloat16")


def _bfloat16_share() -> float:
    """The time of a small matrix product in bfloat16, as a share of its time in float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
        matrix @ matrix  # the first product prepares the kernel
        times = []
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def choose_threads() -> int:
    """
    The threads for a process on a CPU: as many as the user asks for with OMP_NUM_THREADS, or else this process's part
    of the cores that it may run on. Launchers set OMP_NUM_THREADS to 1 where the user has not set it; what the user
    said stands in the environment of the launcher.

    Example:

    ```python
    >>> from epmvg_hf.training.hardware import choose_threads

    >>> choose_threads() >= 1
    True
    ```
    """
    asked = os.environ.get("OMP_NUM_THREADS")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if asked == "1" and launched:
        try:
            asked = psutil.Process().parent().environ().get("OMP_NUM_THREADS")
        except (psutil.Error, AttributeError):  # the launcher has ended, or may not be looked at
            asked = None
    if asked is not None and asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
