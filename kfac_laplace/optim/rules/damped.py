"""The natural gradient with damping."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidType
from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.rules.adam import adam_
from kfac_laplace.optim.rules.damping import Damping, FactoredDamping
from kfac_laplace.optim.rules.descent import count_, tensors
from kfac_laplace.optim.rules.length import AdamNorm, KLClip
from kfac_laplace.optim.rules.ranges import check_decay
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class Damped:
    """U = (B ⊗ A + damping)⁻¹ m̂, then a length.

    Momentum averages gradients before they are preconditioned, m̂ = m / (1 − momentumᵗ), in the
    coordinates of the parameters. Without `AdamNorm` the step depends on the scale of the loss.

    Args:
        damping: `FactoredDamping(λ)`, `ExactDamping(λ)`, or a number λ for the former.
        momentum: decay of the average of gradients; 0 for none.
        length: `AdamNorm()`, `KLClip(κ)`, or None for U as it is.
    """

    damping: Damping | float = field(default_factory=FactoredDamping)
    momentum: float = 0.9
    length: AdamNorm | KLClip | None = field(default_factory=AdamNorm)

    def __post_init__(self) -> None:
        """Refuse what is out of range; a number becomes factored damping."""
        check_decay("momentum", self.momentum)
        if not isinstance(self.damping, Damping):
            object.__setattr__(self, "damping", FactoredDamping(self.damping))
        if not isinstance(self.length, AdamNorm | KLClip | None):
            raise InvalidType(
                "no length of a step",
                where="length",
                got=repr(self.length),
                remedy="Pass AdamNorm(), KLClip(κ) or None",
            )

    @property
    def known_damping(self) -> Damping:
        """The damping, which is a number no longer."""
        assert isinstance(self.damping, Damping)
        return self.damping

    def init(self, gradient: Tensor) -> State:
        """Moment "m" (b, o, i) where there is momentum, "v" for `AdamNorm`, and "step" 0."""
        state: State = {"step": 0}
        if self.momentum or isinstance(self.length, AdamNorm):
            state["m"] = torch.zeros_like(gradient)
        if isinstance(self.length, AdamNorm):
            state["v"] = torch.zeros_like(gradient)
        return state

    @torch.no_grad()
    def directions(
        self,
        gradients: Sequence[Tensor],
        states: Sequence[State],
        bases: Eigenbases,
        dampings: Sequence[float | Tensor] | None = None,
    ) -> list[Direction]:
        """See `Rule.directions`."""
        if not gradients:
            return []
        averages = self._average_(gradients, states)
        inside = bases.enter([one.update.numerator for one in averages])
        turned = torch._foreach_mul(inside, self._inverses(bases, dampings))
        directions = []
        for average, before, after, numerator in zip(
            averages, inside, turned, bases.leave(turned), strict=True
        ):
            divisor, inner = average.update.divisor, None
            if isinstance(self.length, KLClip):
                inner = (before * after).sum() / divisor**2
            directions.append(
                replace(average, update=Update(numerator, None, divisor), inner=inner)
            )
        return directions

    def _average_(self, gradients: Sequence[Tensor], states: Sequence[State]) -> list[Direction]:
        """m and its bias correction, with the norm of Adam's update where that is asked for."""
        if isinstance(self.length, AdamNorm):
            betas = (self.momentum, self.length.beta)
            updates = adam_(gradients, states, betas, self.length.eps)
            return [
                Direction(Update(one.numerator, None, one.divisor), norm=one.matrices().norm())
                for one in updates
            ]
        steps = count_(states)
        if not self.momentum:
            return [Direction(Update(gradient)) for gradient in gradients]
        m = tensors(states, "m")
        torch._foreach_lerp_(m, list(gradients), 1 - self.momentum)
        pairs = zip(m, steps, strict=True)
        return [Direction(Update(one, None, 1 - self.momentum**step)) for one, step in pairs]

    def _inverses(
        self, bases: Eigenbases, dampings: Sequence[float | Tensor] | None
    ) -> list[Tensor]:
        """Eigenvalues (b, o, i) of each group's damped inverse."""
        damping = self.known_damping
        strengths = [damping.strength] * len(bases) if dampings is None else dampings
        pairs = zip(bases.bases, strengths, strict=True)
        return [damping.inverse(one, strength) for one, strength in pairs]

    @torch.no_grad()
    def lengths(
        self, directions: Sequence[Direction], lrs: Sequence[float | Tensor]
    ) -> list[Update]:
        """See `Rule.lengths`; `KLClip` looks at all groups at once."""
        if self.length is None or not directions:
            return [one.update for one in directions]
        if isinstance(self.length, KLClip):
            factor = _clip(self.length.bound, directions, lrs)
            factors = [factor.to(one.update.numerator) for one in directions]
        else:
            factors = [_graft(one) for one in directions]
        scaled = torch._foreach_mul([one.update.numerator for one in directions], factors)
        return [
            replace(one.update, numerator=numerator)
            for one, numerator in zip(directions, scaled, strict=True)
        ]

    def turn(self, states: Sequence[State], before: Eigenbases, after: Eigenbases) -> None:
        """Nothing: moments are in the parameters' coordinates."""


def _clip(bound: float, directions: Sequence[Direction], lrs: Sequence[float | Tensor]) -> Tensor:
    """min(1, √(κ / Σ lr² ⟨U, m̂⟩)), shape ()."""
    total: Tensor | float = 0.0
    for one, lr in zip(directions, lrs, strict=True):
        assert one.inner is not None
        total = total + (float(lr) ** 2 * one.inner).to(directions[0].update.numerator)
    assert isinstance(total, Tensor)
    return (bound / total).sqrt().clamp_max(1)


def _graft(direction: Direction) -> Tensor:
    """The factor, shape (), that gives an update its norm; 0 where the update is zero."""
    update, norm = direction.update, direction.norm
    assert norm is not None and update.denominator is None
    own = update.numerator.norm() / update.divisor
    return torch.where(own > 0, norm / own, torch.zeros_like(own))
