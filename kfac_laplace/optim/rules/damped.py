"""The natural gradient with damping."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.rules.damping import ExactDamping, FactoredDamping
from kfac_laplace.optim.rules.length import AdamNorm, KLClip
from kfac_laplace.optim.rules.rule import Direction, State, Update


@dataclass(frozen=True)
class Damped:
    """U = (B ⊗ A + damping)⁻¹ m̂, then a length.

    Momentum averages gradients before they are preconditioned, m̂ = m / (1 − momentumᵗ).
    Without `AdamNorm` the step depends on the scale of the loss.

    Args:
        damping: `FactoredDamping(λ)`, `ExactDamping(λ)`, or a number λ for the former.
        momentum: decay of the average of gradients; 0 for none.
        length: `AdamNorm()`, `KLClip(κ)`, or None for U as it is.
    """

    damping: FactoredDamping | ExactDamping | float = field(default_factory=FactoredDamping)
    momentum: float = 0.9
    length: AdamNorm | KLClip | None = field(default_factory=AdamNorm)

    def init(self, gradient: Tensor) -> State:
        """Moment "m" (b, o, i) where there is momentum, "v" for `AdamNorm`, and "step" 0."""
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
        """See `Rule.lengths`; `KLClip` looks at all groups at once."""
        raise NotImplementedError
