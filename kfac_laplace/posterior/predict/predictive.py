"""Predictives: the Gaussian over outputs at new inputs, and what follows from it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, MultivariateNormal

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Bernoulli, Gaussian, Likelihood, links


@dataclass(frozen=True)
class Predictive:
    """The predictive distribution at n inputs.

    Args:
        likelihood: p(y | f).
        mean_f: mean of the outputs f, shape (n, t, c).
        covariance_f: covariance of each output row, without noise, shape (n, t, c, c).
        shape: shape (n, ...) in which users see a tensor with one entry for each output.
        class_axis: where the c outputs of one row lie in `shape`.
        sigma: observation noise σ.
        link: "probit" or "bridge", for probabilities in closed form.
        samples: output samples (s, n, t, c); where given, averages are taken over them.
        seed: seed of the samples drawn for the mutual information without given ones.
        n_samples: their number.
    """

    likelihood: Likelihood
    mean_f: Tensor
    covariance_f: Tensor
    shape: torch.Size
    class_axis: int
    sigma: Tensor
    link: str = "probit"
    samples: Tensor | None = None
    seed: int = 0
    n_samples: int = 100

    @property
    def mean(self) -> Tensor:
        """E[y]: class probabilities, or the mean output for regression; shaped like the output."""
        if isinstance(self.likelihood, Gaussian):
            return self._restore(self.mean_f)
        return self.probs

    @property
    def covariance(self) -> Tensor:
        """Covariance of the outputs (latent, without noise): (n, c, c), or (n, t, c, c)."""
        return self.covariance_f[:, 0] if self.covariance_f.shape[1] == 1 else self.covariance_f

    @property
    def probs(self) -> Tensor:
        """Class probabilities, shaped like the model's output.

        Raises:
            InvalidValue: the likelihood has no classes.
        """
        return self._restore(self._probs())

    def distribution(self) -> Distribution:
        """p(y | x) as a `torch.distributions` object, observation noise included."""
        if isinstance(self.likelihood, Gaussian):
            noise = (
                torch.eye(self.mean_f.shape[-1], dtype=self.mean_f.dtype) * self.sigma.cpu() ** 2
            )
            total = self.covariance_f + noise.to(self.covariance_f)
            squeeze = self.mean_f.shape[1] == 1
            mean = self.mean_f[:, 0] if squeeze else self.mean_f
            return MultivariateNormal(mean, total[:, 0] if squeeze else total)
        probs = self._probs()
        if isinstance(self.likelihood, Bernoulli):
            return BernoulliDistribution(probs=self._restore(probs))
        return CategoricalDistribution(probs=probs[:, 0] if probs.shape[1] == 1 else probs)

    @property
    def entropy(self) -> Tensor:
        """Entropy of y in nats for each example (differential for regression), shape (n,)."""
        if isinstance(self.likelihood, Gaussian):
            entropy = self.distribution().entropy()
        else:
            entropy = self._entropy_of(self._probs())
        return entropy.reshape(entropy.shape[0], -1).sum(1)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between y and the parameters in nats, ≥ 0, shape (n,).

        Closed form for regression, ½ log det(I + Σ/σ²); otherwise H[E p] − E H[p] over samples.
        """
        if isinstance(self.likelihood, Gaussian):
            eye = torch.eye(self.mean_f.shape[-1]).to(self.covariance_f)
            ratio = eye + self.covariance_f / self.sigma.to(self.covariance_f) ** 2
            return 0.5 * torch.linalg.slogdet(ratio).logabsdet.sum(1)
        probs = links.activation(self.likelihood, self.output_samples())
        information = self._entropy_of(probs.mean(0)) - self._entropy_of(probs).mean(0)
        # Concavity makes this non-negative up to rounding.
        return information.sum(1).clamp_min(0)

    def output_samples(self) -> Tensor:
        """Samples of the outputs, shape (s, n, t, c)."""
        if self.samples is not None:
            return self.samples
        generator = torch.Generator().manual_seed(self.seed)
        return links.sample_outputs(self.mean_f, self.covariance_f, self.n_samples, generator)

    def _probs(self) -> Tensor:
        """Class probabilities (n, t, c)."""
        if isinstance(self.likelihood, Gaussian):
            raise InvalidValue(
                "regression has no class probabilities", where="probs", remedy="Use `mean`"
            )
        if self.samples is not None:
            return links.activation(self.likelihood, self.output_samples()).mean(0)
        link = links.bridge if self.link == "bridge" else links.probit
        return link(self.likelihood, self.mean_f, self.covariance_f)

    def _entropy_of(self, probs: Tensor) -> Tensor:
        """Entropy (..., t) of probabilities (..., t, c)."""
        entropy = torch.special.entr(probs).sum(-1)
        if isinstance(self.likelihood, Bernoulli):
            entropy = entropy + torch.special.entr(1 - probs).sum(-1)
        return entropy

    def _restore(self, aligned: Tensor) -> Tensor:
        """Shape (n, t, c) back into the shape of the model's output."""
        return restore(aligned, self.shape, self.class_axis)


def restore(aligned: Tensor, shape: torch.Size, class_axis: int) -> Tensor:
    """Undo the likelihood's alignment: (n, t, c) to the model's output shape; (n,) gives (n, 1)."""
    if len(shape) <= 2:
        return aligned[:, 0]
    if class_axis == 1:
        return aligned.unflatten(1, shape[2:]).movedim(-1, 1)
    return aligned.reshape(shape)


def from_samples(
    likelihood: Likelihood, samples: Tensor, class_axis: int, sigma: Tensor
) -> Predictive:
    """A predictive by averages over output samples (s, *output shape)."""
    f = torch.stack([likelihood.align(sample, class_axis) for sample in samples])
    centred = f - f.mean(0)
    covariance = torch.einsum("sntc,sntd->ntcd", centred, centred) / max(1, len(f) - 1)
    return Predictive(
        likelihood, f.mean(0), covariance, samples.shape[1:], class_axis, sigma, samples=f
    )
