"""Training with K-FAC: factors of the training pass, rules that turn gradients into updates."""

from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.kfac import KFAC
from kfac_laplace.optim.rules import (
    AdamNorm,
    Damped,
    EigenAdam,
    ExactDamping,
    FactoredDamping,
    KLClip,
)

__all__ = [
    "KFAC",
    "AdamNorm",
    "Damped",
    "EigenAdam",
    "Estimate",
    "ExactDamping",
    "FactoredDamping",
    "KLClip",
]
