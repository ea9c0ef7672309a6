"""Adam in the eigenbasis of the Kronecker factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.rules.adamw import adam_
from kfac_laplace.optim.rules.descent import tensors
from kfac_laplace.optim.rules.ranges import check_decay, check_least_zero
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class EigenAdam:
    """U = Q_B [(Q_Bᵀ m̂ Q_A) / (√v̂ + ε)] Q_Aᵀ.

    m averages gradients, v the squares of Q_Bᵀ G Q_A. When the basis turns, m turns with it: it is
    kept in the eigenbasis, so that a step takes four products in place of six. v stays by index.
    The scale of the loss drops out, but for ε. Where both sides stay in their own coordinates this
    is AdamW, bit by bit.

    Source: Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", algorithm 3, with the
    bases of K-FAC factors (Martens and Grosse) in place of those of the gradients' covariances.

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
        """Moments "m" and "v" (b, o, i), zeros, and "step" 0."""
        return {"step": 0, "m": torch.zeros_like(gradient), "v": torch.zeros_like(gradient)}

    @torch.no_grad()
    def directions(
        self,
        gradients: Sequence[Tensor],
        states: Sequence[State],
        bases: Eigenbases,
        dampings: Sequence[float | Tensor] | None = None,
    ) -> list[Direction]:
        """See `Rule.directions`."""
        updates = adam_(bases.enter(gradients), states, self.betas, self.eps)
        turned = [index for index, one in enumerate(bases.bases) if not one.own]
        if turned:
            numerators = [updates[index].numerator for index in turned]
            denominators = [updates[index].denominator for index in turned]
            inside = torch._foreach_div(
                numerators, [one for one in denominators if one is not None]
            )
            some = bases if len(turned) == len(bases) else bases.only(turned)
            for index, matrices in zip(turned, some.leave(inside), strict=True):
                updates[index] = Update(matrices, None, updates[index].divisor)
        return [Direction(update) for update in updates]

    def lengths(
        self, directions: Sequence[Direction], lrs: Sequence[float | Tensor]
    ) -> list[Update]:
        """The updates as they are."""
        return [one.update for one in directions]

    @torch.no_grad()
    def turn(self, states: Sequence[State], before: Eigenbases, after: Eigenbases) -> None:
        """m ← Q_Bᵀ (R_B m R_Aᵀ) Q_A from bases R to bases Q."""
        pairs = zip(before.bases, after.bases, strict=True)
        changed = [index for index, (old, new) in enumerate(pairs) if old is not new]
        if not changed:
            return
        moments = tensors([states[index] for index in changed], "m")
        turned = after.only(changed).enter(before.only(changed).leave(moments))
        for moment, new in zip(moments, turned, strict=True):
            moment.copy_(new)
