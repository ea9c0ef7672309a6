"""Where a tuner stands: today's hyperparameters, and the groups that they belong to."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.marglik.grouping import Grouping, difference
from kfac_laplace.marglik.shared import AveragesCurvature
from kfac_laplace.posterior.carry import carried
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.objectives import AnyObjective
from kfac_laplace.posterior.prior import Given
from kfac_laplace.posterior.sharing import sharing_to_plain

log = logging.getLogger("kfac_laplace")


@dataclass(frozen=True)
class Setup:
    """What stays as the tuner was made.

    Args:
        network: the model.
        options: of the curvature.
        fixed: prior_structure, prior_mean and dict_key_y, as `Laplace` takes them.
        free: names of the hyperparameters that are tuned.
        objective: what rounds maximise.
        optimizer: whose curvature rounds without a pass take, if there is one.
        signs: whether rounds may take random signs where an example has many outputs.
    """

    network: Network
    options: CurvatureOptions
    fixed: Mapping[str, Any]
    free: Sequence[str]
    objective: AnyObjective
    optimizer: AveragesCurvature | None
    signs: bool

    @property
    def key_y(self) -> str:
        """Name of the targets where batches are mappings."""
        return str(self.fixed["dict_key_y"])

    def plain_options(self) -> dict[str, Any]:
        """The options on which a state depends, as plain data."""
        structure = sharing_to_plain(self.fixed["prior_structure"])
        return {**self.options.to_plain(), **self.fixed, "prior_structure": structure}


@dataclass(frozen=True)
class Standing:
    """Where a tuner stands.

    Args:
        hyper: today's hyperparameters.
        groups: of the parameters.
        patterns: δ by patterns of names, until a batch was seen.
        start: δ, or patterns of it, and σ with which the tuner began.
        moments: Adam's state, None before its first step.
    """

    hyper: Hyperparameters
    groups: Grouping
    patterns: dict[str, float] | None
    start: tuple[Tensor | dict[str, float], Tensor]
    moments: dict[str, Any] | None = None

    def over(self, groups: Grouping, setup: Setup) -> "Standing":
        """With hyperparameters and moments carried to other groups."""
        prior, before = groups.prior, self.groups.prior
        hyper, moments = self.hyper.to(setup.network.device), self.moments
        if prior is not None and before is None:
            given = prior.resolve(self.patterns or hyper.prior_precision)
            hyper = replace(hyper, prior_precision=given) if self.patterns else hyper
        elif (
            prior is not None
            and before is not None
            and not before.layouts.in_same_order(prior.layouts)
        ):
            if self.groups.shapes == groups.shapes:
                log.info("the model uses its parameters otherwise: prior precisions go on by name")
            else:
                log.info(
                    "other parameters are trained than before (%s): prior precisions go on by name",
                    difference(self.groups.shapes, groups.shapes),
                )
            hyper, carry = carried(hyper, before, prior, self.start[0])
            moments = carry.moments(moments, setup.free.index("prior_precision"))
        patterns = self.patterns if prior is None else None
        return replace(self, hyper=hyper, groups=groups, patterns=patterns, moments=moments)

    def today(self, setup: Setup) -> "Standing":
        """With the parameters that are trained today, grouped anew where they are others."""
        before, now = self.groups, self.groups.today()
        if now.prior is None and before.prior is not None:
            now = now.regrouped(before)
        return self.over(now, setup)

    def before_a_fit(self) -> Given:
        """δ with which a posterior may be made before data show how they group the parameters."""
        if self.groups.prior is None:
            return self.patterns or self.hyper.prior_precision
        start = self.start[0]
        one = isinstance(start, Tensor) and start.numel() == 1
        return start if one else 1.0

    def start_of(self, posterior: Posterior) -> Hyperparameters:
        """The hyperparameters that the tuner started from, as those of a posterior."""
        delta, sigma = self.start
        hyper = posterior.hyperparameters
        try:
            delta = posterior.prior.resolve(delta)
        except InvalidValue:  # of other parameters than are trained now
            delta = hyper.prior_precision
        full = posterior.prior.full(delta)
        return replace(hyper, prior_precision=full, sigma_noise=sigma.to(full.device))

    def damping(self, likelihood: Likelihood, n_data: int) -> dict[str, float]:
        """λ = δ σ² T / N of each parameter, by name; see `MarglikTuner.damping`."""
        if self.patterns is not None:
            return {}
        hyper, prior = self.hyper, self.groups.prior
        unit = likelihood.precision(hyper.sigma_noise) / hyper.temperature * n_data
        strengths = hyper.prior_precision / unit
        if prior is None:
            same = hyper.prior_precision.numel() == 1
            return dict.fromkeys(self.groups.shapes, float(strengths)) if same else {}
        means = {name: one.mean() for name, one in prior.by_group(strengths).items()}
        numbers = torch.stack([*means.values()]).tolist()
        pairs = zip(prior.layouts.groups.values(), numbers, strict=True)
        return {name: number for layout, number in pairs for name in layout.params}
