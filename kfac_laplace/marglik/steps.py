"""A round's steps: from a posterior to better hyperparameters."""

from dataclasses import dataclass
from typing import Any

import torch

from kfac_laplace.marglik.roles import Roles
from kfac_laplace.marglik.standing import Standing
from kfac_laplace.posterior.bounds import Bounds
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.mackay import mackay_steps
from kfac_laplace.posterior.objectives import Objective
from kfac_laplace.posterior.optimum import Search
from kfac_laplace.posterior.steps import adam


@dataclass(frozen=True)
class Steps:
    """How a round moves hyperparameters.

    Args:
        method: "marglik" or "mackay".
        lr: Adam's learning rate.
        count: number of steps.
        free: names of the hyperparameters that are tuned.
        roles: which precisions move; None while all of them stay.
    """

    method: str
    lr: float
    count: int
    free: tuple[str, ...]
    roles: Roles | None

    def improved(
        self, standing: Standing, posterior: Posterior, goal: Objective
    ) -> tuple[Hyperparameters, dict[str, Any] | None, Bounds]:
        """The hyperparameters after these steps, Adam's state, and how far they could go.

        Args:
            standing: where the tuner stands, in the groups of the posterior.
            posterior: at today's hyperparameters.
            goal: what is maximised.
        """
        posterior, moments, waits = (
            posterior.apart_from_unused,
            standing.moments,
            self.roles is None,
        )
        held = torch.ones_like(posterior.unused_precisions)
        if self.roles is not None:
            held = self.roles.precisions(posterior.prior)
        start = standing.start_of(posterior)
        bounds = Bounds.of(posterior, goal, self.free, start, held).within_spread(posterior)
        search = Search(goal, self.free, self.count, bounds=bounds)
        if waits and "sigma_noise" not in self.free:
            return posterior.hyperparameters.detached(), moments, bounds
        if self.method == "mackay":
            return mackay_steps(posterior, search), None, bounds
        hyper, after = adam(posterior, search, lr=self.lr, state=None if waits else moments)
        return hyper, moments if waits else after, bounds
