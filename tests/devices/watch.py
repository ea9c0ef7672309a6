"""What a device holds, and what has the CPU wait for it."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


class Memory:
    """The bytes of the storages that tensors of the device have, now and at most."""

    def __init__(self) -> None:
        self._holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def enter(self, raw: Tensor) -> None:
        """Count a tensor's storage as long as it or another tensor of it is there."""
        storage = raw.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] += 1
        weakref.finalize(raw, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size

    @contextmanager
    def most(self) -> Iterator[list[int]]:
        """The peak over what is held at the start, at the end."""
        gc.collect()
        start, found = self.now, [0]
        self.peak = start
        yield found
        found[0] = self.peak - start


HELD = Memory()


_WAITED: Counter[str] | None = None


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Counts what makes the CPU wait for the device, by call and place in the library."""
    global _WAITED
    before, _WAITED = _WAITED, Counter()
    try:
        yield _WAITED
    finally:
        _WAITED = before


def wait(name: str) -> None:
    if _WAITED is None:
        return
    frames = [f for f in traceback.extract_stack() if "kfac_laplace" in Path(f.filename).parts]
    inside = [f for f in frames if "tests" not in Path(f.filename).parts]
    where = " < ".join(
        f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in reversed(inside[-3:])
    )
    _WAITED[f"{name} at {where}"] += 1
