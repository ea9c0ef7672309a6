"""What a round of the tuner goes on from, with a pass over the data or without."""

from dataclasses import dataclass
from typing import Any

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.marglik.grouping import Grouping
from kfac_laplace.posterior.claims import Claim
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives import Data


@dataclass(frozen=True)
class Found:
    """What a round goes on from.

    Args:
        posterior: at today's hyperparameters.
        groups: of its parameters.
        moments: Adam's, for these.
        constant: loss of the best constant prediction.
        data: the training data, without a loader where there was no pass.
        last_pass: what rounds without a pass will take from the last one.
        claims: what to say.
    """

    posterior: Posterior
    groups: Grouping
    moments: dict[str, Any] | None
    constant: float
    data: Data
    last_pass: GGN | None
    claims: tuple[Claim, ...] = ()
