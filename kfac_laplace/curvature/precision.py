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
    return _symmetric_product(summable(rows))


#: Symmetric products are halved down to so many columns: there is no BLAS call for half of one.
WHOLE_COLUMNS = 256


def _symmetric_product(rows: Tensor) -> Tensor:
    """rowsᵀ rows (b, i, i), of which the upper right is copied from the lower left."""
    i = rows.shape[-1]
    if i <= WHOLE_COLUMNS:
        return rows.mT @ rows
    left, right = rows[..., : i // 2], rows[..., i // 2 :]
    below = right.mT @ left
    upper = torch.cat([_symmetric_product(left), below.mT], -1)
    return torch.cat([upper, torch.cat([below, _symmetric_product(right)], -1)], -2)


def summable(tensor: Tensor) -> Tensor:
    """The tensor in float64, where the device has it."""
    return tensor.double() if tensor.device.type != "mps" else tensor


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast does not round our own products."""
    return torch.autocast(device.type, enabled=False)
