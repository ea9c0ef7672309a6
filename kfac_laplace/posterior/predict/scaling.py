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
#: choice, the mode: at κ = 1 no link was as good as it on all networks tried. "older" files do not
#: say whether theirs was chosen or given; predictions went by the probit link.
AUTO = {
    "default": "mode",
    "loo": "probit",
    "validation": "auto",
    "given": "auto",
    "older": "probit",
}
#: Where τ comes from.
TEMPERATURES = ("default", "validation", "given")

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
        temperature_source: where τ comes from: one of `TEMPERATURES`.
    """

    scale: Tensor
    temperature: Tensor
    source: str = "default"
    temperature_source: str = "default"

    @classmethod
    def start(cls, device: torch.device) -> "Scaling":
        """κ = τ = 1."""
        one = torch.ones((), dtype=torch.float64, device=device)
        return cls(one, one.clone())

    def validated(self, scale: float, temperature: float) -> "Scaling":
        """κ and τ that held-out data chose, on the same device."""
        new = self.scale.new_tensor
        return Scaling(new(scale), new(temperature), "validation", "validation")

    def left_out(self, scale: float) -> "Scaling":
        """κ that leave-one-out chose at `hand_set` τ."""
        chosen = replace(self, scale=self.scale.new_tensor(scale), source="loo")
        if self.temperature_source == "given":
            return chosen
        tau = torch.ones_like(self.temperature)
        return replace(chosen, temperature=tau, temperature_source="default")

    @property
    def hand_set(self) -> "Scaling":
        """Without what data chose: that is 1 again. What was given stays, or may have been."""
        found = self
        if self.source in ("loo", "validation"):
            found = replace(found, scale=torch.ones_like(self.scale), source="default")
        if self.temperature_source == "validation":
            tau = torch.ones_like(self.temperature)
            found = replace(found, temperature=tau, temperature_source="default")
        return found

    @property
    def follows_data(self) -> bool:
        """Whether held-out data chose both numbers, and may choose others."""
        return self.source == "validation" and self.temperature_source != "given"

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
        return replace(self, temperature=tau, temperature_source="given")

    def moments(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """f/τ and κΣ/τ²."""
        scale, tau = self.scale.clone(), self.temperature.clone()  # may be of inference mode
        return mean / tau.to(mean), covariance * (scale / tau.square()).to(mean)

    def samples(self, f: Tensor) -> Tensor:
        """Outputs of functions drawn with covariances times κ, divided by τ."""
        return f if float(self.temperature) == 1 else f / self.temperature.clone().to(f)

    def link(self, link: str, likelihood: Likelihood, said: MutableSet[str]) -> str:
        """What "auto" is; other links are themselves.

        Args:
            link: one of `LINKS`.
            likelihood: p(y | f); without logits links have no meaning.
            said: what was logged already; noted here.
        """
        if link != "auto":
            return link
        found = self.auto(likelihood)
        if found == "mode" and SAYS_MODE not in said:
            said.add(SAYS_MODE)
            log.info(SAYS_MODE)
        return found

    def auto(self, likelihood: Likelihood) -> str:
        """What "auto" is; nothing is logged."""
        return AUTO[self.source] if likelihood.has_logits else "probit"
