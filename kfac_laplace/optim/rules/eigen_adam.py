"""Adam in the eigenbasis of the Kronecker factors."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class EigenAdam:
    """U = Q_B [(Q_Bᵀ m̂ Q_A) / (√v̂ + ε)] Q_Aᵀ.

    m averages gradients in the coordinates of the parameters, where a new basis does not hurt it;
    v averages squares of Q_Bᵀ G Q_A and stays by index when the basis turns. The scale of the loss
    drops out, but for ε. Where both sides stay in their own coordinates this is AdamW, bit by bit.

    Source: Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", algorithm 3, with the
    bases of K-FAC factors (Martens and Grosse) in place of those of the gradients' covariances.

    Args:
        betas: decay of the averages of gradients and of their squares.
        eps: ε.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def init(self, gradient: Tensor) -> State:
        """Moments "m" and "v" (b, o, i), zeros, and "step" 0."""
        raise NotImplementedError

    def directions(
        self,
        gradients: Sequence[Tensor],
        states: Sequence[State],
        bases: Eigenbases,
        dampings: Sequence[float | Tensor] | None = None,
    ) -> list[Direction]:
        """See `Rule.directions`."""
        raise NotImplementedError

    def lengths(
        self, directions: Sequence[Direction], lrs: Sequence[float | Tensor]
    ) -> list[Update]:
        """The updates as they are."""
        return [one.update for one in directions]
