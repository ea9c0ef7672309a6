"""Adam with decoupled weight decay, for parameters without Kronecker factors."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class AdamW:
    """m̂ / (√v̂ + ε), bit by bit what `torch.optim.AdamW(foreach=False)` does.

    Tensors of any shape; complex ones as pairs of real numbers, as torch does.

    Args:
        betas: decay of the averages of gradients and of their squares.
        eps: ε.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def init(self, gradient: Tensor) -> State:
        """Moments "m" and "v" of the gradient's shape, zeros, and "step" 0."""
        raise NotImplementedError

    def directions(
        self,
        gradients: Sequence[Tensor],
        states: Sequence[State],
        bases: Eigenbases | None = None,
        dampings: Sequence[float | Tensor] | None = None,
    ) -> list[Direction]:
        """See `Rule.directions`; needs no bases."""
        raise NotImplementedError

    def lengths(
        self, directions: Sequence[Direction], lrs: Sequence[float | Tensor]
    ) -> list[Update]:
        """The updates as they are."""
        return [one.update for one in directions]
