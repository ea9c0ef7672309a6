"""In which precision curvature is summed."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: gradients and rows in half precision lose the curvature."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


#: "auto" or a dtype.
FactorDtype = torch.dtype | Literal["auto"]
FACTOR_DTYPES = ("auto", torch.float64, torch.float32)

_CHOSEN: ContextVar[FactorDtype] = ContextVar("factor dtype", default="auto")
_SHARED = ContextVar("shared rows", default=False)


@contextmanager
def sums_in(dtype: FactorDtype) -> Iterator[None]:
    """Sum products of rows in this precision, or in that of the rows if that is higher."""
    token = _CHOSEN.set(dtype)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@contextmanager
def rows_of(shared: bool) -> Iterator[None]:
    """Say whether examples have many rows each, at shared positions."""
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which products of the tensor are summed, where the device has it.

    Products in float32 leave eigenvalue errors of about 1e-7 λ_max. A Kronecker product multiplies
    them by the other factor's largest eigenvalue, which easily exceeds a small prior precision:
    on rank-deficient inputs the evidence is then wrong by tens of nats and more.
    """
    in_double = tensor.device.type != "mps" and _CHOSEN.get() != torch.float32
    return torch.float64 if in_double else accumulable(tensor.new_empty(0)).dtype


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of products before they are summed: by "auto" the rows' own if they are many.

    Where every example has many rows, their errors average out and factors are rarely
    rank-deficient. On the CPU alone: elsewhere float32 may mean TF32.
    """
    if _CHOSEN.get() == "auto" and _SHARED.get() and tensor.device.type == "cpu":
        return accumulable(tensor.new_empty(0)).dtype
    return sum_dtype(tensor)


def summable(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which its products are summed."""
    return tensor.to(sum_dtype(tensor))


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast does not round our own products."""
    return torch.autocast(device.type, enabled=False)
