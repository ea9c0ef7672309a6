"""In which precision curvature is summed."""

import torch
from torch import Tensor


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: products and sums in half precision lose the curvature."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast does not round our own products."""
    return torch.autocast(device.type, enabled=False)
