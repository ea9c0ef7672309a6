"""Floating-point operations that torch does not see: products by BLAS through scipy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

#: takes operations and the precision that they are made in
Count = Callable[[int, torch.dtype], None]

_COUNT: ContextVar[Count | None] = ContextVar("count", default=None)


def note(operations: int, dtype: torch.dtype) -> None:
    """Tell who counts, if anybody does."""
    count = _COUNT.get()
    if count is not None:
        count(operations, dtype)


@contextmanager
def counted(count: Count) -> Iterator[None]:
    """Have `count` told of such operations inside."""
    token = _COUNT.set(count)
    try:
        yield
    finally:
        _COUNT.reset(token)
