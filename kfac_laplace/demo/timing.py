"""Wall-clock time that is true on accelerators as well."""

import time

import torch
from torch import Tensor


class Stopwatch:
    """Seconds since construction, each reading taken once all work queued on the device is done.

    Args:
        x: any tensor on the device whose work is timed.
    """

    def __init__(self, x: Tensor):
        self._device = x.device
        self._start = self._now()

    def __call__(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
