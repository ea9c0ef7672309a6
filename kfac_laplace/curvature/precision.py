"""In which precision curvature is summed, and the sums of symmetric products."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: gradients and rows in half precision lose the curvature."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


_SUMS = ContextVar("sums", default=torch.float64)


@contextmanager
def sums_in(dtype: torch.dtype) -> Iterator[None]:
    """Sum products of rows in this precision, or in that of the rows if that is higher."""
    token = _SUMS.set(dtype)
    try:
        yield
    finally:
        _SUMS.reset(token)


def summable(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which products are summed, where the device has it.

    Products in float32 leave eigenvalue errors of about 1e-7 λ_max. A Kronecker product multiplies
    them by the other factor's largest eigenvalue, which easily exceeds a small prior precision:
    on rank-deficient inputs the evidence is then wrong by tens of nats and more.
    """
    tensor = accumulable(tensor)
    return tensor.double() if _in_double(tensor) else tensor


def _in_double(tensor: Tensor) -> bool:
    return tensor.device.type != "mps" and _SUMS.get() == torch.float64


#: Symmetric products are halved down to so many columns: there is no BLAS call for half of one.
WHOLE_COLUMNS = 256


class GramSum:
    """Σ row rowᵀ of b stacks of rows, added to in place.

    Args:
        b: number of stacks.
        i: width of the rows.
        like: a tensor on the device and in the precision of the rows.
    """

    def __init__(self, b: int, i: int, like: Tensor):
        self._lower = summable(like.new_empty(0)).new_empty(b, i, i)
        self._filled = [False] * b

    def __len__(self) -> int:
        """Number of stacks."""
        return len(self._lower)

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows (b', *lead, i) to the stacks from `start` on."""
        stacks = range(start, start + len(rows))
        beta = 1 if all(self._filled[k] for k in stacks) else 0
        if not beta:  # the first product of each stack overwrites it
            for k in stacks:
                if self._filled[k]:
                    beta = self._fill(stacks)
                    break
        total = self._lower[start : start + len(rows)]
        if len(rows) > 1:
            flat = summable(rows).flatten(1, -2)
            total.baddbmm_(flat.mT, flat, beta=beta)
        else:
            # One product for each entry of the first axes: rows need not lie one after another.
            parts = rows[0].reshape(-1, *rows.shape[-2:]) if rows.ndim > 2 else rows
            if parts.stride(-1) == 1:
                parts = parts.reshape(1, -1, rows.shape[-1])
            _add_stacks(total[0], summable(parts), beta)
        for k in stacks:
            self._filled[k] = True

    def _fill(self, stacks: range) -> int:
        """Make empty stacks zero where others among them are not empty."""
        for k in stacks:
            if not self._filled[k]:
                self._lower[k].zero_()
        return 1

    def total(self) -> Tensor:
        """The sums (b, i, i), symmetric; they go on growing with what is added later."""
        self._fill(range(len(self._lower)))
        self._filled = [True] * len(self._lower)
        _mirror(self._lower)
        return self._lower


def _add_stacks(total: Tensor, stacks: Tensor, beta: int) -> None:
    """Add Σ stackᵀ stack over stacks (m, r, i) to the lower triangle of `total` (i, i)."""
    i = stacks.shape[-1]
    if i <= WHOLE_COLUMNS:
        total.addbmm_(stacks.mT, stacks, beta=beta)
        return
    half = i // 2
    left, right = stacks[..., :half], stacks[..., half:]
    total[half:, :half].addbmm_(right.mT, left, beta=beta)
    _add_stacks(total[:half, :half], left, beta)
    _add_stacks(total[half:, half:], right, beta)


def _mirror(lower: Tensor) -> None:
    """Copy the blocks of `_add_stacks` below the diagonal to above it."""
    i = lower.shape[-1]
    if i > WHOLE_COLUMNS:
        half = i // 2
        lower[..., :half, half:] = lower[..., half:, :half].mT
        _mirror(lower[..., :half, :half])
        _mirror(lower[..., half:, half:])


def gram(rows: Tensor) -> Tensor:
    """Σ row rowᵀ (b, i, i) of rows (b, *lead, i), in float64 where the device has it."""
    total = GramSum(len(rows), rows.shape[-1], rows)
    total.add(rows)
    return total.total()


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast does not round our own products."""
    return torch.autocast(device.type, enabled=False)
