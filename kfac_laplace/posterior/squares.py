"""‖θ − μ‖² of many tensors at once, cheap to differentiate: what prior and training loss share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import accumulable

#: A mean is one number, or a tensor with a number for each entry.
Mean = float | Tensor

#: Tensors of one shape and at most so many entries are better taken together: networks of many
#: small tensors spend more time on each call than in it.
SMALL = 2**12


def squared_norms(bundles: Sequence[Sequence[Tensor]], means: Sequence[Mean]) -> Tensor:
    """‖θ − μ‖² of each tensor, float64, shape (k,).

    Args:
        bundles: θ, of floating-point dtypes on one device; those of a bundle have one shape.
        means: μ of each bundle.
    """
    pairs = zip(bundles, means, strict=True)
    return torch.cat([_by_tensor(_stack(b), len(b), mean).double() for b, mean in pairs])


@dataclass(frozen=True)
class WeightedSquares:
    """Σ w ‖θ − μ‖² as a function of many tensors, cheap to call and to differentiate, also twice.

    Tensors of a bundle are copied into one stack. Of one alone in its bundle nothing is made but
    its gradient, where it has at least single precision and μ = 0. The device is never waited for.

    Args:
        bundles: names of the tensors; those of a bundle have one shape.
        means: μ of each bundle.
        weights: w of the tensors of each bundle, float64 constants of shape (k,).
    """

    bundles: Sequence[Sequence[str]]
    means: Sequence[Mean]
    weights: Sequence[Tensor]

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum, shape (), in the precision of the tensors, but at least single.

        Args:
            tensors: θ by name, of floating-point dtypes on one device.
        """
        stacks = [_stack([tensors[name] for name in bundle]) for bundle in self.bundles]
        found: Tensor = _Weighted.apply(self, *stacks)  # type: ignore[no-untyped-call]
        return found

    def weights_like(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The weights in the precision of the stacks."""
        pairs = zip(stacks, self.weights, self._single, strict=True)
        return [wide if stack.dtype == wide.dtype else single for stack, wide, single in pairs]

    @cached_property
    def _single(self) -> list[Tensor]:
        with torch.inference_mode(False):
            return [weight.float() for weight in self.weights]


class _Weighted(torch.autograd.Function):
    # One node in place of the several for each tensor that autograd would make.

    @staticmethod
    def forward(ctx: Any, function: WeightedSquares, *stacks: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*stacks)
        total = stacks[0].new_zeros((), dtype=accumulable(stacks[0]).dtype)
        parts = zip(stacks, function.weights_like(stacks), function.means, strict=True)
        for stack, weight, mean in parts:
            total = total + torch.dot(weight, _by_tensor(stack, len(weight), mean))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stacks, function, double = ctx.saved_tensors, ctx.function, 2 * grad
        gradients: list[Tensor | None] = [None]
        parts = zip(stacks, function.weights_like(stacks), function.means, strict=True)
        for stack, weight, mean in parts:
            centred = _centred(stack, mean)
            # (k, 1, …, 1) for a stack, one number for a tensor that is none
            slope = (double * weight).to(centred.dtype)
            slope = slope.reshape((-1, *[1] * (centred.ndim - 1)) if len(weight) > 1 else ())
            gradients.append((centred * slope).to(stack.dtype))
        return tuple(gradients)


def _stack(bundle: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as (k, *shape); one alone as it is."""
    return bundle[0] if len(bundle) == 1 else torch.stack(list(bundle))


def _by_tensor(stack: Tensor, count: int, mean: Mean) -> Tensor:
    """‖θ − μ‖² of each of `count` tensors, shape (count,)."""
    if count > 1:
        rows = _centred(stack, mean).reshape(count, -1)
        return torch.linalg.vector_norm(rows, dim=1).square()
    row = _centred(stack, mean).reshape(-1)
    # Float32 norms of many entries lose digits, and so do dot products of some machines.
    cut = len(row) - len(row) % SMALL
    pieces = torch.linalg.vector_norm(row[:cut].reshape(-1, SMALL), dim=1).square()
    return (pieces.sum() + torch.dot(row[cut:], row[cut:]))[None]


def _centred(stack: Tensor, mean: Mean) -> Tensor:
    """θ − μ in at least single precision."""
    stack = accumulable(stack)
    if isinstance(mean, Tensor):
        return stack - mean.to(stack.dtype)
    return stack if mean == 0.0 else stack - mean
