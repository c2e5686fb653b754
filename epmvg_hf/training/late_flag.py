"""Reads a boolean of an accelerator one step late, so that the accelerator is not waited for."""

import torch


class LateFlag:
    """
    A boolean scalar of a device, copied to the host in the background. On a CPU it is there at once.

    Args:
        flag (`torch.BoolTensor` of shape `()`): the scalar.
    """

    def __init__(self, flag: torch.Tensor):
        self._copied: torch.Event | None = None
        self._on_host = flag
        if flag.device.type != "cpu":
            self._on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._on_host.copy_(flag, non_blocking=True)
            self._copied = torch.Event(flag.device.type)
            self._copied.record()

    def read(self) -> bool:
        """The value. Called a step later, this waits for next to nothing: the device has gone on by then."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._on_host)
