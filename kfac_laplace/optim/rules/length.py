"""How long a step is: that of another method, or as far as the model of the loss is trusted."""

from dataclasses import dataclass

from kfac_laplace.optim.rules.ranges import check_decay, check_least_zero
from kfac_laplace.options import check_positive


@dataclass(frozen=True)
class AdamNorm:
    """Grafting: every group moves as far as under Adam, ‖U‖_F = ‖m̂ / (√v̂ + ε)‖_F.

    Learning rates and schedules for Adam carry over; the scale of the loss drops out, but for ε and
    the damping. m is the rule's own momentum.
    Source: Agarwal et al., "Learning rate grafting: transferability of optimizer tuning".

    Args:
        beta: decay of the average of squared gradients.
        eps: ε.
    """

    beta: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_decay("beta", self.beta)
        check_least_zero("eps", self.eps)


@dataclass(frozen=True)
class KLClip:
    """All updates times min(1, √(κ / Σ lr² ⟨U, m̂⟩)): twice the KL divergence is at most κ.

    ⟨U, m̂⟩ = Uᵀ (F + damping) U, as U = (F + damping)⁻¹ m̂ with momentum *inside*.
    Source: Ba, Grosse and Martens, "Distributed second-order optimization using Kronecker-factored
    approximations", section 5 (the clip), there without momentum.

    Args:
        bound: κ.
    """

    bound: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_positive("KLClip", self.bound)
