"""Predictives: the Gaussian over outputs at new inputs, and what follows from it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution

from kfac_laplace.curvature.linalg.dtypes import without_autocast
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Latent, Likelihood, aligned_target
from kfac_laplace.likelihoods.predictive import RowPredictive
from kfac_laplace.options import check_choice
from kfac_laplace.posterior.predict.finite import COVARIANCE, MEAN, finite
from kfac_laplace.posterior.predict.glm import OutputGaussian
from kfac_laplace.posterior.predict.uncertainty import (
    SCORES,
    Uncertainty,
    Variances,
    by_row,
    counted_positions,
)


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
        link: how probabilities come from the Gaussian: "mode", "probit", "centred", "bridge", or
            "auto" for the centred probit at moderate variances and points beyond them.
        samples: output samples (s, n, t, c); where given, averages are taken over them.
        seed: seed of the samples drawn where averages need some and none are given.
        n_samples: their number.
        outputs: the Gaussian over f as the posterior has it, at κ = τ = 1.
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
    outputs: OutputGaussian | None = None

    @property
    def mean(self) -> Tensor:
        """E[y], for classes their probabilities; shaped like the output but for its last axis.

        That one is as long as the output's for the library's likelihoods, and half as long for
        "heteroscedastic", which has two outputs for each y.
        """
        return self._restore(finite(self._rows.mean, "E[y]", MEAN))

    @property
    def output_mean(self) -> Tensor:
        """Mean of the outputs f, shaped like the model's output."""
        return self._restore(finite(self.mean_f, "outputs of the model", MEAN))

    @property
    def covariance(self) -> Tensor:
        """Covariance of the outputs (latent, without noise): (n, c, c), or (n, t, c, c)."""
        covariance = finite(self.covariance_f, "covariance of the outputs", COVARIANCE)
        return covariance[:, 0] if covariance.shape[1] == 1 else covariance

    @property
    def probs(self) -> Tensor:
        """Class probabilities, shaped like the model's output.

        Raises:
            InvalidValue: the likelihood has no classes.
        """
        return self._restore(finite(self._rows.probs, "probabilities", MEAN))

    def distribution(self) -> Distribution:
        """p(y | x) as a `torch.distributions` object, observation noise included.

        A mixture over points of f where there is no closed form.
        """
        return self._rows.distribution(self._restore)

    @property
    def entropy(self) -> Tensor:
        """Entropy of y in nats for each example (differential for densities), shape (n,)."""
        return finite(self._rows.entropy(), "entropy of y", MEAN)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between y and the parameters in nats, ≥ 0, shape (n,).

        Closed form for regression, ½ log det(I + Σ/σ²); otherwise averages over samples.
        """
        return finite(self._rows.information(), "mutual information", MEAN)

    @property
    def aleatoric(self) -> Tensor:
        """Expected entropy of y where the parameters are known, in nats, shape (n,).

        For classes an average over samples, as `epistemic` is: the two add up to the entropy of the
        average of p over them, which is `entropy` where probabilities are such averages.
        """
        return finite(self._rows.aleatoric(), "expected entropy", MEAN)

    @property
    def ood_score(self) -> Tensor:
        """How unlike the training data the inputs look, larger for stranger ones, shape (n,).

        Classification: the entropy of the centred probit with the covariance that the layer used
        last has of its own; binary likewise, by the probit link. Gaussian noise: tr Σ/σ². Others:
        the mutual information. It is taken at κ = τ = 1, so that calibration does not change it
        (but for the mutual information), and only its order means something.

        Raises:
            InvalidValue: the predictive is one of samples.
        """
        if self.outputs is None:
            raise InvalidValue(
                "the score takes the covariance of the outputs in closed form",
                where="ood_score",
                got="samples",
                remedy="Use pred_type='glm'",
            )
        found = self.outputs
        score = self._rows.strangeness(Latent(found.mean, found.covariance), found.head)
        return finite(score, "ood_score", MEAN)

    def score(self, name: str = "last_layer") -> Tensor:
        """How strange or doubtful inputs are, larger for more so, summed over positions, (n,).

        Args:
            name: "last_layer" for `ood_score`, "entropy", "epistemic", "variance" for the trace of
                the outputs' covariance, or "max_prob" for 1 − the largest probability.

        Raises:
            InvalidValue: another name; one that this predictive does not have.
        """
        check_choice("score", name, SCORES)
        if name == "variance":
            return self.covariance_f.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1)
        if name == "max_prob":
            return finite(self._rows.doubt(), "probabilities", MEAN)
        found: Tensor = getattr(self, {"last_layer": "ood_score"}.get(name, name))
        return found

    @property
    def variances(self) -> Variances:
        """Var y by output and its two parts; of classes that of their indicators.

        Closed form for Gaussian noise, Σ and σ²; otherwise averages over samples, or by the rule
        for one output.
        """
        parts = (finite(part, "variance of y", MEAN) for part in self._rows.variances())
        return Variances(*(self._restore(part) for part in parts))

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x) at each position with the loss's weights, 0 for ignored labels.

        Args:
            y: targets as the loss takes them.

        Returns:
            Shaped like labels, (n,) or (n, ...); of independent outputs like the output.
        """
        y = y.to(self.mean_f.device)
        target = aligned_target(self.likelihood, y, self.shape, self.mean_f, self.class_axis)
        return self._restore(finite(self._rows.log_prob(target), "log p(y)", MEAN))

    def by_position(self, counts: Tensor | None = None) -> Uncertainty:
        """Entropy and its parts at each position; `entropy` and its like are sums of these.

        Args:
            counts: a mask of the positions that count, or labels, of which the ignored ones
                (−100) do not; shaped like labels. None: all.

        Raises:
            InvalidValue: another shape, or labels of a likelihood that ignores none.
            InvalidType: neither truth values nor whole numbers.
        """
        rows = self.likelihood.predict(by_row(self._latent), self.sigma, self.link)
        shape = self.mean_f.shape[:2]
        parts = [
            self._restore(finite(part, "entropy of y", MEAN).reshape(shape))
            for part in (rows.entropy(), rows.information(), rows.aleatoric())
        ]
        kept = counted_positions(self.likelihood, counts, parts[0])
        return Uncertainty(*(part * kept for part in parts))

    def output_samples(self) -> Tensor:
        """Samples of the outputs, shape (s, n, t, c)."""
        return self._latent.draws

    @cached_property
    def _rows(self) -> RowPredictive:
        """What the likelihood makes of the Gaussian, by output row."""
        return self.likelihood.predict(self._latent, self.sigma, self.link)

    @cached_property
    def _latent(self) -> Latent:
        return Latent(self.mean_f, self.covariance_f, self.samples, self.seed, self.n_samples)

    def _restore(self, aligned: Tensor) -> Tensor:
        """Shape (n, t, c) back into the shape of the model's output."""
        return restore(aligned, self.shape, self.class_axis)


def restore(aligned: Tensor, shape: torch.Size, class_axis: int) -> Tensor:
    """Undo the likelihood's alignment: (n, t, c) to the model's output shape; (n,) gives (n, 1).

    Args:
        aligned: values (n, t, ·) of any number for each row, or one (n, t).
        shape: shape of the model's output.
        class_axis: where the c outputs of one row lie in it.
    """
    if len(shape) <= 2:
        return aligned[:, 0]
    if class_axis != -1:
        values = aligned.unflatten(1, shape[1:class_axis] + shape[class_axis + 1 :])
        return values.movedim(-1, class_axis) if aligned.ndim == 3 else values
    return aligned.reshape(*shape[:-1], *aligned.shape[2:])


def from_samples(
    likelihood: Likelihood, samples: Tensor, class_axis: int, sigma: Tensor
) -> Predictive:
    """A predictive by averages over output samples (s, *output shape), in at least float32.

    Raises:
        InvalidValue: a covariance that is not finite, of likelihoods that make use of it.
    """
    f = torch.stack([likelihood.align(sample, class_axis) for sample in samples])
    around = f - f[0]  # exactly 0 where draws are equal, whose mean is rounded
    centred = around - around.mean(0)
    with without_autocast(f.device):
        covariance = torch.einsum("sntc,sntd->ntcd", centred, centred) / max(1, len(f) - 1)
    if likelihood.has_gaussian_noise:  # others average over the samples: theirs may be as it likes
        finite(covariance, "covariance of the outputs", COVARIANCE)
    return Predictive(
        likelihood, f.mean(0), covariance, samples.shape[1:], class_axis, sigma, samples=f
    )
