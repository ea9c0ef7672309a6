"""Adam with decoupled weight decay, for parameters without Kronecker factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.rules.adam import Adam, adam_
from kfac_laplace.optim.rules.rule import Direction, State


@dataclass(frozen=True)
class AdamW(Adam):
    """m̂ / (√v̂ + ε), bit by bit what `torch.optim.AdamW(foreach=False)` does.

    Tensors of any shape; complex ones as pairs of real numbers, as torch does.

    Args:
        betas: decay of the averages of gradients and of their squares.
        eps: ε.
    """

    @torch.no_grad()
    def directions(
        self,
        gradients: Sequence[Tensor],
        states: Sequence[State],
        bases: Eigenbases | None = None,
        dampings: Sequence[float | Tensor] | None = None,
    ) -> list[Direction]:
        """See `Rule.directions`; needs no bases."""
        return [Direction(update) for update in adam_(gradients, states, self.betas, self.eps)]

    def turn(self, states: Sequence[State], before: Eigenbases, after: Eigenbases) -> None:
        """Nothing: moments are in the parameters' coordinates."""
