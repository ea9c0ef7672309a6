"""Checks that several likelihoods share: finite numbers, targets shaped as outputs, weights."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods.axes import same_layout


def check_finite(f: Tensor, where: str = "model output") -> None:
    """Raise `InvalidValue` unless every entry is finite."""
    if not bool(torch.isfinite(f).all()):
        raise InvalidValue(
            "non-finite values",
            where=where,
            got=f"{int((~torch.isfinite(f)).sum())} of {f.numel()} entries",
            remedy="Check the inputs and the weights; nothing was changed",
        )


def check_same_layout(shape: Sequence[int], target: Tensor) -> None:
    """Targets are shaped as the output, but for axes of length 1: no broadcasting."""
    if not same_layout(shape, target.shape):
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=f"{tuple(target.shape)} for an output {tuple(shape)}",
            remedy="Give them the output's shape",
        )


def check_leading_axes(shape: Sequence[int], target: Tensor) -> None:
    """Targets share the output's axes, up to its last and those of length 1: no broadcasting."""
    before = shape if len(shape) == 1 else shape[:-1]
    lead, own = ([s for s in sizes if s != 1] for sizes in (before, target.shape))
    if own[: len(lead)] != lead:
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=f"{tuple(target.shape)} for an output {tuple(shape)}",
            remedy="Give them the output's shape, up to the last axis; where another one holds the "
            "outputs of a row, say so with class_axis",
        )


def target_of(distribution: Distribution, target: Tensor, f: Tensor) -> Tensor:
    """Check that `target` can be a draw from a distribution of rows, and view it as one.

    Args:
        distribution: p(y | f), of batch shape (n, t).
        target: values of any real dtype, as many as a draw has for each example.
        f: the outputs (n, t, c).
    """
    shape = distribution.batch_shape + distribution.event_shape
    if target.shape[:1] != shape[:1] or target.numel() != shape.numel():
        n, t = f.shape[:2]
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=tuple(target.shape),
            remedy=f"The output has {n} examples, {t} positions and targets {tuple(shape[2:])}",
        )
    if target.is_complex():
        raise InvalidType("targets must be real", where="target", got=target.dtype)
    y = target.reshape(shape).to(f.dtype)
    check_finite(y, where="target")
    allowed = _in_support(distribution, y)
    if not bool(allowed.all()):
        raise InvalidValue(
            "targets outside the support of the likelihood",
            where="target",
            got=f"{int((~allowed).sum())} of {allowed.numel()} rows, "
            f"values {float(y.min()):.6g}..{float(y.max()):.6g}",
            remedy=f"They must be draws of {distribution}",
        )
    return y


def _in_support(distribution: Distribution, y: Tensor) -> Tensor:
    """Mask of the rows that can be draws; of all where the distribution names no support."""
    try:
        support = distribution.support
    except NotImplementedError:
        support = None
    return torch.ones((), dtype=torch.bool, device="cpu") if support is None else support.check(y)


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
