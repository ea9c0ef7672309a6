"""Scaled losses: what `torch.amp.GradScaler` tells an optimiser that unscales gradients itself."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from kfac_laplace.errors import UnsupportedUse


def unscale_(optimizer: Optimizer, parameters: Iterable[Tensor]) -> float | None:
    """Free gradients from the scale of the loss.

    `GradScaler` sets `grad_scale` and `found_inf` while it calls `step`.

    Args:
        optimizer: what it sets them on.
        parameters: whose gradients.

    Returns:
        The scale, or None where the gradients are not finite.

    Raises:
        UnsupportedUse: gradients are unscaled already.
    """
    found = getattr(optimizer, "found_inf", None)
    if found is not None and bool(found):
        return None
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        if found is not None:
            raise UnsupportedUse(
                "gradients were unscaled before the step, and their scale is not known",
                where="GradScaler.unscale_",
                remedy="The empirical Fisher needs it: leave unscaling to scaler.step, or choose "
                "curvature=Estimate(fisher='mc')",
            )
        return 1.0
    for p in parameters:
        if p.grad is not None:
            p.grad.div_(scale)
    return float(scale)
