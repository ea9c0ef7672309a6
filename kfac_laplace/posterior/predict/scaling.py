"""What predictions make of the Gaussian over outputs: N(f, Σ) becomes N(f/τ, κΣ/τ²).

κ is the posterior scale and τ the predictive temperature [Guo et al. 2017]; neither enters the
evidence. Where κ comes from decides which link "auto" is.
"""

import logging
from collections.abc import MutableSet
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.posterior.hyperparameters import one_number, positive, real

log = logging.getLogger("kfac_laplace")

#: Where κ comes from, and the link that "auto" then is: that by which κ was chosen. Without a
#: choice, the mode: at κ = 1 no link was as good as it on all networks tried.
AUTO = {"default": "mode", "loo": "probit", "validation": "auto", "given": "auto"}

WHERE = "posterior_scale"

#: Logged once.
SAYS_MODE = (
    "link_approx='auto' gives the network's own probabilities: nothing has set the scale of the "
    "covariance, and averages over it at κ = 1 are often far too uncertain. covariance, epistemic "
    "and ood_score are the posterior's. Pass val_loader to fit or calibrate for averages at a "
    "scale that held-out data choose, or link_approx='centred' for those at κ = 1"
)


@dataclass(frozen=True)
class Scaling:
    """κ and τ of predictions.

    Args:
        scale: κ ≥ 0, float64, shape ().
        temperature: τ > 0 of the outputs, float64, shape (); 1 for likelihoods without logits.
        source: where κ comes from: a key of `AUTO`.
    """

    scale: Tensor
    temperature: Tensor
    source: str = "default"

    @classmethod
    def start(cls, device: torch.device) -> "Scaling":
        """κ = τ = 1."""
        one = torch.ones((), dtype=torch.float64, device=device)
        return cls(one, one.clone())

    def at(self, scale: float, temperature: float, source: str) -> "Scaling":
        """Other numbers, on the same device."""
        new = self.scale.new_tensor
        return Scaling(new(scale), new(temperature), source)

    def with_scale(self, value: float | Tensor) -> "Scaling":
        """κ as a user gives it.

        Raises:
            InvalidValue: below zero, or no finite number.
        """
        scale = one_number(real(value, WHERE, self.scale.device).detach(), WHERE)
        if float(scale) < 0:
            raise InvalidValue(
                "κ multiplies the covariance, and must not be below zero",
                where=WHERE,
                got=float(scale),
                remedy="Pass a number ≥ 0: 1 for the posterior as it is, 0 for its mode",
            )
        return replace(self, scale=scale, source="given")

    def with_temperature(self, value: float | Tensor, likelihood: Likelihood) -> "Scaling":
        """τ as a user gives it.

        Raises:
            InvalidValue: no positive number, or another than 1 without logits.
        """
        where = "predictive_temperature"
        tau = one_number(positive(value, where, self.scale.device), where).detach()
        if float(tau) != 1 and not likelihood.has_logits:
            raise InvalidValue(
                "the outputs are no logits that a temperature could divide",
                where=where,
                got=float(tau),
                remedy="Leave it at 1: what is uncertain about y is the likelihood's own, as σ is",
            )
        return replace(self, temperature=tau)

    def moments(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """f/τ and κΣ/τ²."""
        tau = self.temperature
        return mean / tau.to(mean), covariance * (self.scale / tau.square()).to(mean)

    def samples(self, f: Tensor) -> Tensor:
        """Outputs of functions drawn with covariances times κ, divided by τ."""
        return f if float(self.temperature) == 1 else f / self.temperature.to(f)

    def link(self, link: str, likelihood: Likelihood, said: MutableSet[str]) -> str:
        """What "auto" is; other links are themselves.

        Args:
            link: one of `LINKS`.
            likelihood: p(y | f); without logits links have no meaning.
            said: what was logged already; noted here.
        """
        if link != "auto":
            return link
        if not likelihood.has_logits:
            return "probit"
        found = AUTO[self.source]
        if found == "mode" and SAYS_MODE not in said:
            said.add(SAYS_MODE)
            log.info(SAYS_MODE)
        return found
