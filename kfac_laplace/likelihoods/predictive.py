"""What follows about y from a Gaussian over outputs: by closed forms, or by averages.

Everything is by output row, aligned as (n, t). `Predictive` of the posterior shapes it for users.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods.distributions import draw
from kfac_laplace.likelihoods.latent import Latent

#: Undoes the alignment of a tensor (n, t, c), where users see outputs in another shape.
Restore = Callable[[Tensor], Tensor]


class RowPredictive(ABC):
    """p(y | x) for each output row, the outputs integrated out."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """E[y], shape (n, t, c); class probabilities for labels."""

    @property
    def probs(self) -> Tensor:
        """Class probabilities (n, t, c).

        Raises:
            InvalidValue: y is no class.
        """
        raise InvalidValue(
            "the likelihood has no class probabilities", where="probs", remedy="Use `mean`"
        )

    @abstractmethod
    def distribution(self, restore: Restore) -> Distribution:
        """p(y | x), of batch shape (n,) where t = 1, else (n, t); shaped as users see outputs.

        Args:
            restore: for distributions with one entry for each output.
        """

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x) of aligned targets with the weights of the loss, (n, t) or (n, t, c)."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy of y in nats, summed over positions, shape (n,)."""

    @abstractmethod
    def information(self) -> Tensor:
        """Mutual information of y and f in nats, summed over positions, ≥ 0, shape (n,)."""

    def aleatoric(self) -> Tensor:
        """E H[y | f] in nats, summed over positions, shape (n,)."""
        return self.entropy() - self.information()

    @abstractmethod
    def variances(self) -> tuple[Tensor, Tensor]:
        """Var E[y | f] and E Var[y | f], shape (n, t, ·) each."""

    def doubt(self) -> Tensor:
        """1 − the probability of the likeliest class, summed over positions, shape (n,).

        Raises:
            InvalidValue: y is no class.
        """
        return (1 - self.probs.amax(-1)).sum(1)

    def strangeness(self, latent: Latent, head: Tensor) -> Tensor:
        """How far inputs are from the data, larger for stranger ones, shape (n,).

        The mutual information unless overridden.

        Args:
            latent: the Gaussian over f as the posterior has it, at κ = τ = 1.
            head: the share in its covariance of the layer used last, shape (n, t, c, c).
        """
        return self.information()


class Mixture(RowPredictive):
    """An average of p(y | f) over points of f: draws, or a rule for a single output.

    Args:
        latent: the Gaussian over f, or samples.
        components: f (..., c) to the distribution of y of each row, batch shape (...).
        mean: E[y] where it is known in closed form, shape (n, t, ·).
    """

    def __init__(
        self,
        latent: Latent,
        components: Callable[[Tensor], Distribution],
        mean: Tensor | None = None,
    ):
        self._latent, self._components, self._mean = latent, components, mean

    @property
    def mean(self) -> Tensor:
        """E[y], in closed form or by the average of the components' means."""
        if self._mean is not None:
            return self._mean
        f, log_weights = self._latent.points
        return average(log_weights, self._components(f).mean)

    def distribution(self, restore: Restore) -> Distribution:
        """A `MixtureSameFamily` over the points."""
        f, log_weights = self._latent.points
        f = f[:, :, 0] if f.shape[2] == 1 else f
        components = self._components(f.movedim(0, -2))
        weights = Categorical(logits=log_weights.expand(components.batch_shape))
        return MixtureSameFamily(weights, components)

    def log_prob(self, y: Tensor) -> Tensor:
        """log Σ_k w_k p(y | f_k), shape (n, t)."""
        return self._joint(y).logsumexp(0)

    def entropy(self) -> Tensor:
        """Information + E H[y | f] where the components know their entropy, else −E log p(y)."""
        return self._entropy_and_information[0]

    def information(self) -> Tensor:
        """E KL(p(f | y) ‖ p(f)) over draws of y: never below zero."""
        return self._entropy_and_information[1]

    def variances(self) -> tuple[Tensor, Tensor]:
        """By averages of the components' means and variances."""
        log_weights, components = self._latent.points[1], self._at_points
        return spread(log_weights, components.mean), average(log_weights, components.variance)

    def _joint(self, y: Tensor) -> Tensor:
        """log w_k + log p(y | f_k), shape (k, n, t)."""
        return self._log_weights + self._at_points.log_prob(y)

    @cached_property
    def _log_weights(self) -> Tensor:
        return self._latent.points[1][:, None, None]

    @cached_property
    def _at_points(self) -> Distribution:
        return self._components(self._latent.points[0])

    @cached_property
    def _entropy_and_information(self) -> tuple[Tensor, Tensor]:
        """Averages over one y for each draw of f, shape (n,) each."""
        draws = self._latent.draws
        if draws.requires_grad and torch.is_grad_enabled():
            raise UnsupportedUse(
                "an average over draws of y has no derivative by autograd",
                where="entropy, epistemic, aleatoric",
                got=type(self._components(draws[:1])).__name__,
                remedy="Ask for them under torch.no_grad(), or of predict without enable_backprop",
            )
        generator = Generator().manual_seed(self._latent.seed + 1)
        targets = draw(self._components(draws.cpu()), generator).to(draws.device)
        surprise, information = draws.new_zeros(draws.shape[1:3]), draws.new_zeros(draws.shape[1:3])
        for y in targets:
            joint = self._joint(y)
            log_prob = joint.logsumexp(0)
            share = joint - log_prob  # log p(f_k | y)
            surprise -= log_prob
            information += torch.where(
                share > -math.inf, share.exp() * (share - self._log_weights), 0.0
            ).sum(0)
        information /= len(targets)
        try:
            own = average(self._latent.points[1], self._at_points.entropy())
        except NotImplementedError:
            return (surprise / len(targets)).sum(1), information.sum(1)
        return (information + own).sum(1), information.sum(1)


class ClassPredictive(RowPredictive):
    """Labels with probabilities that are a function of f, averaged over points of f.

    Args:
        latent: the Gaussian over f, or samples.
        activation: f (..., c) to class probabilities (..., k).
    """

    def __init__(self, latent: Latent, activation: Callable[[Tensor], Tensor]):
        self.latent, self.activation = latent, activation

    @property
    def mean(self) -> Tensor:
        """The probabilities."""
        return self.probs

    @cached_property
    def probs(self) -> Tensor:
        """E p(f), shape (n, t, k): over samples where they are given."""
        if self.latent.samples is not None:
            return self.activation(self.latent.samples).mean(0)
        return self.linked()

    def linked(self) -> Tensor:
        """E p(f) under the Gaussian, shape (n, t, k); closed forms override this."""
        f, log_weights = self.latent.points
        return average(log_weights, self.activation(f))

    def distribution(self, restore: Restore) -> Distribution:
        """A categorical distribution, of batch shape (n,) where t = 1, else (n, t)."""
        return Categorical(probs=self.probs[:, 0] if self.probs.shape[1] == 1 else self.probs)

    def log_prob(self, y: Tensor) -> Tensor:
        """log p_y, shape (n, t)."""
        picked = self.probs.gather(-1, y.long()[..., None])[..., 0]
        return picked.clamp_min(torch.finfo(picked.dtype).tiny).log()

    def entropy(self) -> Tensor:
        """−Σ p log p."""
        return self.entropy_of(self.probs).sum(1)

    def information(self) -> Tensor:
        """H[E p] − E H[p] over draws of f."""
        probs = self.activation(self.latent.draws)
        information = self.entropy_of(probs.mean(0)) - self.entropy_of(probs).mean(0)
        # Concavity makes this non-negative up to rounding.
        return information.sum(1).clamp_min(0)

    def aleatoric(self) -> Tensor:
        """E H[p] over draws of f."""
        return self.entropy_of(self.activation(self.latent.draws)).mean(0).sum(1)

    def variances(self) -> tuple[Tensor, Tensor]:
        """Var p and E p(1 − p) over draws of f: y as one-hot rows."""
        probs = self.activation(self.latent.draws)
        return probs.var(0, correction=0), (probs * (1 - probs)).mean(0)

    def entropy_of(self, probs: Tensor) -> Tensor:
        """Entropy (..., t) of probabilities (..., t, k)."""
        return torch.special.entr(probs).sum(-1)


class NormalPredictive(RowPredictive):
    """Values with Gaussian noise around a Gaussian f: all in closed form.

    Args:
        latent: the Gaussian over f.
        sigma: standard deviation of the noise.
    """

    def __init__(self, latent: Latent, sigma: Tensor):
        self._latent, self._sigma = latent, sigma

    @property
    def mean(self) -> Tensor:
        """The mean of f."""
        return self._latent.mean

    def distribution(self, restore: Restore) -> Distribution:
        """N(mean, Σ + σ² I)."""
        mean, total = self._latent.mean, self._with_noise()
        if mean.shape[1] == 1:
            mean, total = mean[:, 0], total[:, 0]
        return MultivariateNormal(mean, total)

    def log_prob(self, y: Tensor) -> Tensor:
        """log N(y | mean, Σ + σ² I), shape (n, t)."""
        return MultivariateNormal(self._latent.mean, self._with_noise()).log_prob(y)

    def entropy(self) -> Tensor:
        """½ log det 2πe (Σ + σ² I)."""
        entropy = MultivariateNormal(self._latent.mean, self._with_noise()).entropy()
        return entropy.sum(1)

    def information(self) -> Tensor:
        """½ log det(I + Σ/σ²)."""
        covariance = self._latent.covariance
        eye = torch.eye(covariance.shape[-1]).to(covariance)
        ratio = eye + covariance / self._sigma.to(covariance) ** 2
        return 0.5 * torch.linalg.slogdet(ratio).logabsdet.sum(1)

    def aleatoric(self) -> Tensor:
        """½ log det 2πe σ² I."""
        each = 0.5 * (2 * math.pi * math.e * self._sigma.to(self._latent.mean) ** 2).log()
        return each.expand_as(self._latent.mean).flatten(1).sum(1)

    def variances(self) -> tuple[Tensor, Tensor]:
        """The diagonal of Σ, and σ²."""
        variance = self._latent.covariance.diagonal(dim1=-2, dim2=-1)
        return variance, (self._sigma.to(variance) ** 2).expand_as(variance)

    def strangeness(self, latent: Latent, head: Tensor) -> Tensor:
        """tr Σ/σ²."""
        trace = latent.covariance.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1)
        return trace / self._sigma.to(trace) ** 2

    def _with_noise(self) -> Tensor:
        mean, covariance = self._latent.mean, self._latent.covariance
        noise = torch.eye(mean.shape[-1], dtype=mean.dtype, device="cpu") * self._sigma.cpu() ** 2
        return covariance + noise.to(covariance)


def spread(log_weights: Tensor, values: Tensor) -> Tensor:
    """Σ_k w_k (values_k − mean)² over the first axis."""
    return average(log_weights, (values - average(log_weights, values)).square())


def average(log_weights: Tensor, values: Tensor) -> Tensor:
    """Σ_k w_k values_k over the first axis."""
    shape = (-1, *[1] * (values.ndim - 1))
    return (log_weights.exp().reshape(shape) * values).sum(0)
