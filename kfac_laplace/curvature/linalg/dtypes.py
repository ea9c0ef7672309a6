"""In which precision curvature is summed."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: gradients and rows in half precision lose the curvature."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


#: "auto" or a dtype.
FactorDtype = torch.dtype | Literal["auto"]
FACTOR_DTYPES = ("auto", torch.float64, torch.float32)


@dataclass(frozen=True)
class SumDtype:
    """The precision in which products of rows are made, and that in which they are summed.

    Both are at least that of the rows. Products in float32 leave eigenvalue errors of about 1e-7
    λ_max. A Kronecker product multiplies them by the other factor's largest eigenvalue, which
    easily exceeds a small prior precision: on rank-deficient inputs the evidence is then wrong by
    tens of nats and more.

    Args:
        chosen: "auto", torch.float64 or torch.float32.
        shared: whether examples have many rows each, at shared positions.
    """

    chosen: FactorDtype = "auto"
    shared: bool = False

    def of_rows(self, shared: bool) -> "SumDtype":
        """The same choice for rows at shared positions, or for one row an example."""
        return replace(self, shared=shared)

    def sums(self, like: Tensor) -> torch.dtype:
        """The precision of sums: float64 unless float32 was chosen, where the device has it."""
        if self.chosen == torch.float32:
            return accumulable(like.new_empty(0)).dtype
        return in_double(like.new_empty(0)).dtype

    def products(self, like: Tensor) -> torch.dtype:
        """The precision of products before they are summed: by "auto" the rows' own if many.

        Where every example has many rows, their errors average out and factors are rarely
        rank-deficient. On the CPU alone: elsewhere float32 may mean TF32.
        """
        if self.chosen == "auto" and self.shared and like.device.type == "cpu":
            return accumulable(like.new_empty(0)).dtype
        return self.sums(like)

    def summable(self, tensor: Tensor) -> Tensor:
        """The tensor in the precision in which its products are summed."""
        return tensor.to(self.sums(tensor))


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in the best that its device has."""
    return accumulable(tensor) if tensor.device.type == "mps" else tensor.double()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which the caller's autocast does not round our own products."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
