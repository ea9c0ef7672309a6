"""What a round of hyperparameter steps leaves behind."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One round of hyperparameter steps.

    Args:
        epoch: epoch after which it took place.
        evidence: log q(D) at the new hyperparameters, in nats over the whole data.
        log_likelihood: Σ log p(y | f, σ), before division by T.
        log_det_ratio: log det P − log det P₀.
        scatter: (θ − μ)ᵀ P₀ (θ − μ).
        hyperparameters: detached values by name.
        seconds: duration of the whole round.
        curvature_seconds: duration of the curvature pass within it.
    """

    epoch: int
    evidence: float
    log_likelihood: float
    log_det_ratio: float
    scatter: float
    hyperparameters: dict[str, Tensor]
    seconds: float
    curvature_seconds: float
