"""Wall-clock time that is true on accelerators as well."""

import time

from torch import Tensor

from kfac_laplace.devices import finish


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
        finish(self._device)
        return time.perf_counter()
