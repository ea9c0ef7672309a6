"""Adam's moments, and the updates that they make."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.optim.rules.descent import count_, real_views, scale_, tensors
from kfac_laplace.optim.rules.ranges import check_decay, check_least_zero
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class Adam:
    """What Adam's rules share, in whatever coordinates.

    Args:
        betas: decay of the averages of gradients and of their squares.
        eps: ε.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for beta in self.betas:
            check_decay("betas", beta)
        check_least_zero("eps", self.eps)

    def init(self, gradient: Tensor) -> State:
        """Moments "m" and "v" of the gradient's shape, zeros, and "step" 0."""
        return {"step": 0, "m": torch.zeros_like(gradient), "v": torch.zeros_like(gradient)}

    def lengths(
        self, directions: Sequence[Direction], lrs: Sequence[float | Tensor]
    ) -> list[Update]:
        """The updates as they are."""
        return [one.update for one in directions]


def adam_(
    gradients: Sequence[Tensor], states: Sequence[State], betas: tuple[float, float], eps: float
) -> list[Update]:
    """Update the moments "m" and "v" and count a step; Adam's updates as quotients.

    The order of operations is that of `torch.optim.adam._single_tensor_adam`. Calls for many
    tensors at once do on each what the call for one does, and spare Python's time.
    """
    if not gradients:
        return []
    beta_m, beta_v = betas
    gradients = real_views(gradients)
    m, v = real_views(tensors(states, "m")), real_views(tensors(states, "v"))
    steps = count_(states)
    torch._foreach_lerp_(m, gradients, 1 - beta_m)
    scale_(v, beta_v)
    torch._foreach_addcmul_(v, gradients, gradients, 1 - beta_v)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, [(1 - beta_v**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    return [
        Update(numerator, denominator, 1 - beta_m**step)
        for numerator, denominator, step in zip(m, denominators, steps, strict=True)
    ]
