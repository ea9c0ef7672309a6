"""Adam in the eigenbasis of the Kronecker factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.optim.bases import Bases, Eigenbases, Side
from kfac_laplace.optim.rules.adam import Adam, adam_
from kfac_laplace.optim.rules.descent import tensors
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class EigenAdam(Adam):
    """U = Q_B [(Q_Bᵀ m̂ Q_A) / (√v̂ + ε)] Q_Aᵀ.

    m averages gradients, v the squares of Q_Bᵀ G Q_A. When the basis turns, m turns with it: it is
    kept in the eigenbasis, so that a step takes four products in place of six. v is carried over
    as variances of uncorrelated entries are (`turn`). The scale of the loss drops out, but for ε.
    Where both sides stay in their own coordinates this is AdamW, bit by bit.

    Source: Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", algorithm 3, with the
    bases of K-FAC factors (Martens and Grosse) in place of those of the gradients' covariances, and
    v carried over, where it stays by index there.

    Args:
        betas: decay of the averages of gradients and of their squares.
        eps: ε.
    """

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
        turned = [not one.own for one in bases.bases]
        inside = [
            one.numerator / one.denominator
            if turns and one.denominator is not None
            else one.numerator
            for one, turns in zip(updates, turned, strict=True)
        ]
        outside = bases.leave(inside)
        return [
            Direction(Update(matrices, None, one.divisor) if turns else one)
            for one, matrices, turns in zip(updates, outside, turned, strict=True)
        ]

    @torch.no_grad()
    def turn(self, states: Sequence[State], before: Eigenbases, after: Eigenbases) -> None:
        """m ← (Q_Bᵀ R_B) m (R_Aᵀ Q_A) from bases R to bases Q; sides that stayed are left alone.

        v ← |Q_Bᵀ R_B|² v |R_Aᵀ Q_A|², squared entry by entry: the second moments of gradients whose
        entries are uncorrelated in the old basis. By index, directions that had next to no gradient
        would lend their v to others where factors gain rank, and steps would be without bound.
        """
        pairs = zip(before.bases, after.bases, strict=True)
        changes = [(index, *_changed(old, new)) for index, (old, new) in enumerate(pairs)]
        changes = [(index, old, new) for index, old, new in changes if not (old.own and new.own)]
        moments = tensors([states[index] for index, _, _ in changes], "m")
        squares = tensors([states[index] for index, _, _ in changes], "v")
        turns = [
            Bases(_turn(old.left, new.left), _turn(old.right, new.right)) for _, old, new in changes
        ]
        squared = [Bases(_squared(one.left), _squared(one.right)) for one in turns]
        for kept, by in ((moments, turns), (squares, squared)):
            for one, turned in zip(kept, Eigenbases(by).enter(kept), strict=True):
                one.copy_(turned)


def _turn(old: Side, new: Side) -> Side:
    """Rᵀ Q (b, d, d) from eigenvectors R to Q, as eigenvectors; none where neither side has any."""
    if old.vectors is None or new.vectors is None:
        return Side(new.values, new.vectors if old.vectors is None else old.vectors.mT)
    return Side(new.values, old.vectors.mT @ new.vectors)


def _squared(turn: Side) -> Side:
    """The same with every entry squared."""
    return Side(turn.values, None if turn.vectors is None else turn.vectors.square())


def _changed(old: Bases, new: Bases) -> tuple[Bases, Bases]:
    """Both bases with own coordinates for the sides that are the same in both."""
    if old.left is new.left:
        plain = Side(new.left.values)
        old, new = Bases(plain, old.right), Bases(plain, new.right)
    if old.right is new.right:
        plain = Side(new.right.values)
        old, new = Bases(old.left, plain), Bases(new.left, plain)
    return old, new
