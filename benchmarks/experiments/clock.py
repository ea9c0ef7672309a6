"""Processor time and wall-clock time of a piece of work."""

import time

import torch

from kfac_laplace.devices import finish


class Clock:
    """Both kinds of seconds since construction, once work queued on the device is done.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str):
        self._device = torch.device(device)
        self._start = self._now()

    def __call__(self) -> dict[str, float]:
        """`seconds` of this process's processors, `wall_seconds` on the clock."""
        used, wall = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return {"seconds": used, "wall_seconds": wall}

    def _now(self) -> tuple[float, float]:
        finish(self._device)
        return time.process_time(), time.perf_counter()
