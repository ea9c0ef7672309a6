"""Binary classification: logits on their own, with or without a weight of the positive class."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Distribution, Independent

from kfac_laplace.devices import sent
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.activations import last_activation, sigmoid_values
from kfac_laplace.likelihoods.checks import (
    check_length,
    check_same_layout,
    elementwise_target,
    loss_weight,
)
from kfac_laplace.likelihoods.latent import Latent
from kfac_laplace.likelihoods.likelihood import Likelihood
from kfac_laplace.likelihoods.links import probit
from kfac_laplace.likelihoods.predictive import ClassPredictive, Restore
from kfac_laplace.likelihoods.roots import diagonal_roots


class Bernoulli(Likelihood):
    """Logistic likelihood of each logit on its own: Λ = diag(p (1 − p)).

    The loss is that of `torch.nn.functional.binary_cross_entropy_with_logits` with
    reduction="sum": −[w y log p + (1 − y) log(1 − p)], so that m(y) = w y + 1 − y for each logit.
    With w ≠ 1 its exponential is no normalised density; the evidence takes the loss as it stands.

    Args:
        pos_weight: w ≥ 0, one value or one for each output (the last axis of the model's output).

    Raises:
        InvalidValue: negative or non-finite weights.
        InvalidType: weights that are no numbers.
    """

    def __init__(self, *, pos_weight: Tensor | Sequence[float] | float | None = None):
        self.pos_weight = None if pos_weight is None else loss_weight(pos_weight, "pos_weight")

    has_logits = True

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """Zeros and ones of probabilities sigmoid(f), without the weight."""
        return Independent(BernoulliDistribution(logits=f), 1)

    def check_axis(self, shape: Sequence[int], target: Tensor, axis: int) -> None:
        """One target for each output, whatever the axis."""
        check_same_layout(shape, target)

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Targets in [0, 1] of any real dtype, as (n, t, c)."""
        if target.numel() == f.numel() and target.shape[:1] == f.shape[:1]:
            target = target.reshape(f.shape)
        y = elementwise_target(target.to(f.dtype), f)
        if float(y.min()) < 0 or float(y.max()) > 1:
            raise InvalidValue(
                "binary targets outside [0, 1]",
                where="target",
                got=f"values {float(y.min())}..{float(y.max())}",
                remedy="Pass 0 and 1",
            )
        if self.pos_weight is not None:
            check_length(self.pos_weight, (1, f.shape[-1]), "pos_weight")
        return y

    def activation(self, f: Tensor) -> str:
        """A sigmoid, its logarithm, or the softmax of two."""
        if type(self).distribution is not Bernoulli.distribution:  # what f means is another's word
            return ""
        return last_activation(f) or ("sigmoid" if sigmoid_values(f) else "")

    def positive(self, y: Tensor) -> Tensor:
        """w y, the weight of log p in the loss; that of log(1 − p) is 1 − y."""
        return y if self.pos_weight is None else y * self.pos_weight.to(y)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ w y log p + (1 − y) log(1 − p), shape (n,)."""
        weight = None if self.pos_weight is None else self.pos_weight.to(f)
        losses = F.binary_cross_entropy_with_logits(f, y, pos_weight=weight, reduction="none")
        return -losses.flatten(1).sum(1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood itself."""
        return self.log_prob(f.double(), y.double(), torch.ones((), device="cpu")).sum()

    def log_likelihood(self, statistic: Tensor, count: float, sigma: Tensor) -> Tensor:
        """The summed statistic."""
        return statistic

    target_rows = 2

    def target_sums(self, y: Tensor, f: Tensor) -> Tensor:
        """Σ w y and Σ 1 − y by output, (2, c)."""
        y = y.double().flatten(0, -2)
        return torch.stack([self.positive(y), 1 - y]).sum(1)

    def uninformed(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor] | None:
        """Zeros and ones alike."""
        return torch.zeros_like(f[0, 0]), f.new_ones(())

    def constant_log_likelihood(self, sums: Tensor) -> float:
        """That of the base rate of each output, as the loss weighs it."""
        if not sums.numel():
            return math.nan
        return float(torch.special.xlogy(sums, sums / sums.sum(0)).nansum())

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """m(y) sigmoid(f) − w y."""
        importance = self.importance(y)
        p = f.sigmoid()
        return (p if importance is None else importance * p) - self.positive(y)

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """One column for each logit: √(p (1 − p))."""
        # σ(f) σ(−f) keeps its digits where 1 − σ(f) rounds to zero.
        return diagonal_roots((f.sigmoid() * (-f).sigmoid()).sqrt())

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Draw zeros and ones."""
        noise = torch.rand(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        return (sent(noise, f.device) < f.sigmoid()).to(f.dtype)

    def random_root(self, f: Tensor, generator: Generator) -> Tensor:
        """sigmoid(f) minus a draw, without the weight."""
        return f.sigmoid() - self.sample(f, generator)

    def hessian(self, f: Tensor) -> Tensor:
        """diag(p (1 − p))."""
        return torch.diag_embed(f.sigmoid() * (-f).sigmoid())

    def importance(self, y: Tensor) -> Tensor | None:
        """w y + 1 − y for each logit, (n, t, c)."""
        return None if self.pos_weight is None else self.positive(y) + (1 - y)

    def stand_in_targets(self, f: Tensor, generator: Generator) -> Tensor:
        """Draws where positives have a weight; outputs where nothing depends on them."""
        return f if self.pos_weight is None else self.sample(f, generator)

    def predict(self, latent: Latent, sigma: Tensor, link: str) -> "LogisticPredictive":
        """Probabilities by the mode or the probit link, or by averages over samples."""
        return LogisticPredictive(self, latent, link)

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """Probabilities: those of functions, without the draw of a label."""
        return f.sigmoid()

    def labelled(self, probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Each output as a choice of two; targets between 0 and 1 are rounded."""
        p = probs.flatten()
        return torch.stack([1 - p, p], -1), (y.flatten() > 0.5).long()

    def options(self) -> dict[str, Any]:
        """`pos_weight` as a list."""
        return {"pos_weight": None if self.pos_weight is None else self.pos_weight.tolist()}


class LogisticPredictive(ClassPredictive):
    """Probabilities of a one, each output on its own.

    Args:
        likelihood: for the weights of targets.
        latent: the Gaussian over f, or samples.
        link: "mode" or "probit", which "centred" and "auto" are for single logits.
    """

    def __init__(self, likelihood: Bernoulli, latent: Latent, link: str):
        super().__init__(latent, torch.sigmoid)
        self._likelihood, self._link = likelihood, link

    def linked(self) -> Tensor:
        """Probabilities (n, t, c) at the mean or by the probit link, within 0.018 of the integral.

        Raises:
            InvalidValue: the Laplace bridge, which single logits do not have.
        """
        if self._link == "bridge":
            raise InvalidValue(
                "the Laplace bridge needs at least two logits",
                where="link_approx",
                got="'bridge' with a binary likelihood",
                remedy="Use 'probit' or 'mc'",
            )
        return self._moved().sigmoid()

    def distribution(self, restore: Restore) -> Distribution:
        """A Bernoulli distribution for each output, shaped as the output."""
        return BernoulliDistribution(probs=restore(self.probs))

    def log_prob(self, y: Tensor) -> Tensor:
        """w y log p + (1 − y) log(1 − p) with its weight, shape (n, t, c)."""
        # Products of the logits keep the complement's digits: 1 − p loses them.
        p, other = self.probs, self._complement()
        tiny = torch.finfo(p.dtype).tiny
        weight = self._likelihood.positive(y)
        return weight * p.clamp_min(tiny).log() + (1 - y) * other.clamp_min(tiny).log()

    def entropy_of(self, probs: Tensor) -> Tensor:
        """−Σ p log p + (1 − p) log(1 − p) over the outputs, (..., t)."""
        return super().entropy_of(probs) + torch.special.entr(1 - probs).sum(-1)

    def doubt(self) -> Tensor:
        """min(p, 1 − p), summed over the outputs."""
        return torch.minimum(self.probs, self._complement()).flatten(1).sum(1)

    def strangeness(self, latent: Latent, head: Tensor) -> Tensor:
        """Entropy of the probit link with the covariance of the layer used last alone."""
        return self.entropy_of(probit(latent.mean, head).sigmoid()).sum(1)

    def _complement(self) -> Tensor:
        """1 − p."""
        if self.latent.samples is not None:
            return (-self.latent.samples).sigmoid().mean(0)
        return (-self._moved()).sigmoid()

    def _moved(self) -> Tensor:
        """Logits whose probabilities are averages."""
        mean = self.latent.mean
        return mean if self._link == "mode" else probit(mean, self.latent.covariance)
