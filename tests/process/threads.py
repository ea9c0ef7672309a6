"""Calls in threads that take turns as often as Python lets them, and what a process has once."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: Seconds after which a thread is said to hang.
LONG = 120


@contextmanager
def switching() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What calls return that run in a thread each; the first error is raised."""
    found: list[Any] = [None] * len(calls)

    def run(k: int) -> None:
        try:
            found[k] = calls[k]()
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(calls))]
    with switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive(), "threads wait for each other"
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


class Process:
    """What a process has once: generators, choices of kernels, filters of warnings."""

    def __init__(self) -> None:
        self.found = self._now()

    def check(self, but: str = "") -> None:
        for name, value in self._now().items():
            assert name == but or str(value) == str(self.found[name]), f"{name} changed"

    @staticmethod
    def _now() -> dict[str, Any]:
        cuda = torch.backends.cuda
        return {
            "torch's random state": torch.get_rng_state().tolist(),
            "numpy's random state": np.random.get_state(legacy=False)["state"]["key"].tolist(),
            "Python's random state": random.getstate(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "flash attention": cuda.flash_sdp_enabled(),
            "attention by blocks": cuda.mem_efficient_sdp_enabled(),
            "plain attention": cuda.math_sdp_enabled(),
            "filters of warnings": warnings.filters,
            "dtype": torch.get_default_dtype(),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
