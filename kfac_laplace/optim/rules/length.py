"""How long a step is: that of another method, or as far as the model of the loss is trusted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdamNorm:
    """Grafting: every group moves as far as under Adam, ‖U‖_F = ‖m̂ / (√v̂ + ε)‖_F.

    Learning rates and schedules for Adam carry over; the scale of the loss drops out. m is the
    rule's own momentum.

    Args:
        beta: decay of the average of squared gradients.
        eps: ε.
    """

    beta: float = 0.95
    eps: float = 1e-8


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
