"""‖θ − μ‖² of many tensors at once, cheap to differentiate: what prior and training loss share."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import accumulable

#: A mean is one number, or a tensor with a number for each entry.
Mean = float | Tensor

#: On the CPU norms of more entries than these are accumulated in order, and float32 loses digits.
FEW = 2**14
WIDE = (torch.float32, torch.float64)


def squared_norms(tensors: Sequence[Tensor], means: Sequence[Mean]) -> Tensor:
    """‖θ − μ‖² of each tensor, float64, shape (k,); differentiable in the tensors, also twice.

    Beside the gradients nothing larger than one tensor is made, nothing at all for tensors of at
    least single precision with μ = 0, and the device is never waited for.

    Args:
        tensors: θ, of any shapes and floating-point dtypes, on one device.
        means: μ of each.
    """
    found: Tensor = _SquaredNorms.apply(means, *tensors)  # type: ignore[no-untyped-call]
    return found


class _SquaredNorms(torch.autograd.Function):
    # One node for all tensors: autograd's own, several for each, take longer than the whole step of
    # a small network. torch._foreach_* are what torch's optimisers call.

    @staticmethod
    def forward(ctx: Any, means: Sequence[Mean], *tensors: Tensor) -> Tensor:
        ctx.means = means
        ctx.save_for_backward(*tensors)
        largest = FEW if tensors[0].device.type == "cpu" else math.inf
        roots: list[Tensor | None] = [None] * len(tensors)
        together = [
            k
            for k, (t, mean) in enumerate(zip(tensors, means, strict=True))
            if t.numel() <= largest and t.dtype in WIDE and _is_zero(mean)
        ]
        if together:
            norms = torch._foreach_norm([tensors[k] for k in together])
            for k, norm in zip(together, norms, strict=True):
                roots[k] = norm
        for k, root in enumerate(roots):
            if root is None:
                flat = _centred(tensors[k], means[k]).reshape(-1)
                roots[k] = torch.dot(flat, flat).sqrt()
        return torch.stack([root for root in roots if root is not None]).double().square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, means = ctx.saved_tensors, ctx.means
        double = any(t.dtype == torch.float64 for t in tensors)
        # A number wider than its tensor would take the slow way.
        slopes = (2 * grad).to(torch.float64 if double else torch.float32).unbind()
        gradients: list[Tensor | None] = [None] * len(tensors)
        together = [k for k, mean in enumerate(means) if _is_zero(mean)]
        if together:
            scaled = torch._foreach_mul(
                [tensors[k] for k in together], [slopes[k] for k in together]
            )
            for k, gradient in zip(together, scaled, strict=True):
                gradients[k] = gradient
        for k, found in enumerate(gradients):
            if found is None:
                gradients[k] = (_centred(tensors[k], means[k]) * slopes[k]).to(tensors[k].dtype)
        return None, *gradients


def _is_zero(mean: Mean) -> bool:
    return isinstance(mean, float) and mean == 0.0


def _centred(tensor: Tensor, mean: Mean) -> Tensor:
    """θ − μ in at least single precision."""
    tensor = accumulable(tensor)
    if isinstance(mean, Tensor):
        return tensor - mean.to(tensor.dtype)
    return tensor if mean == 0.0 else tensor - mean
