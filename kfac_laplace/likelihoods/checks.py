"""Checks that several likelihoods share: finite numbers, targets shaped as outputs, weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue


def check_finite(f: Tensor, where: str = "model output") -> None:
    """Raise `InvalidValue` unless every entry is finite."""
    if not bool(torch.isfinite(f).all()):
        raise InvalidValue(
            "non-finite values",
            where=where,
            got=f"{int((~torch.isfinite(f)).sum())} of {f.numel()} entries",
            remedy="Check the inputs and the weights; nothing was changed",
        )


def check_same_layout(output: Tensor, target: Tensor) -> None:
    """Targets are shaped as the output, but for axes of length 1: no broadcasting."""
    if [s for s in output.shape if s != 1] != [s for s in target.shape if s != 1]:
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=f"{tuple(target.shape)} for an output {tuple(output.shape)}",
            remedy="Give them the output's shape",
        )


def elementwise_target(target: Tensor, f: Tensor) -> Tensor:
    """Check that `target` has one value for each output and view it as f."""
    if not target.is_floating_point():
        raise InvalidType(
            "targets must be floating point",
            where="target",
            got=target.dtype,
            remedy="Convert them with target.float()",
        )
    n, t, c = f.shape
    if target.ndim == 1:
        fits = t * c == 1 and target.shape == (n,)
    else:
        fits = target.shape[0] == n and target.numel() == f.numel() and target.shape[-1] == c
    if not fits:
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=tuple(target.shape),
            remedy=f"The output has {n} examples, {t} positions and {c} outputs",
        )
    check_finite(target, where="target")
    return target.reshape(f.shape).to(f.dtype)


def loss_weight(value: Tensor | Sequence[float] | float, where: str) -> Tensor:
    """Weights of a loss as a float64 vector of their own, checked to be finite and ≥ 0."""
    try:
        weight = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(
            "not a vector of numbers", where=where, got=repr(value), remedy="Pass a tensor (C,)"
        ) from error
    if weight.ndim > 1 or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise InvalidValue(
            "weights are finite numbers ≥ 0, one for each class or output",
            where=where,
            got=f"{tuple(weight.shape)} with values {weight.flatten().tolist()[:10]}",
        )
    return weight.reshape(-1)


def check_length(weight: Tensor, lengths: Sequence[int], where: str) -> None:
    """Raise `InvalidValue` unless the model's outputs fit the weights."""
    if len(weight) not in lengths:
        raise InvalidValue(
            f"the model has {lengths[-1]} outputs",
            where=where,
            got=f"{len(weight)} weights",
            remedy="Give one weight for each output",
        )
