"""In which precision curvature is summed."""

import torch
from torch import Tensor


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: gradients and rows in half precision lose the curvature."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def gram(rows: Tensor) -> Tensor:
    """Σ_r row rowᵀ (b, i, i) of rows (b, r, i), in float64 where the device has it.

    Products in float32 leave eigenvalue errors of about 1e-7 λ_max. A Kronecker product multiplies
    them by the other factor's largest eigenvalue, which easily exceeds a small prior precision:
    on rank-deficient inputs the evidence is then wrong by tens of nats and more.
    """
    rows = rows.double() if rows.device.type != "mps" else rows
    return rows.mT @ rows


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast does not round our own products."""
    return torch.autocast(device.type, enabled=False)
