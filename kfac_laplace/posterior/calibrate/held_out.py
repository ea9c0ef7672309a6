"""Predicted outputs of held-out points with their targets, and how well they are predicted."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.curvature.shards import own_part, ranks_reading
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Latent, Likelihood, aligned_target
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.passes import counted
from kfac_laplace.posterior.predict.glm import output_gaussian
from kfac_laplace.process import draws_kept


@dataclass(frozen=True)
class HeldOut:
    """Outputs predicted for points that the prediction did not see, with their targets.

    Args:
        mean: shape (n, t, c).
        covariance: of each output row at κ = 1, shape (n, t, c, c).
        target: aligned targets.
        examples: number of examples, where it is not n.
        others: points with another number of outputs in a row.
    """

    mean: Tensor
    covariance: Tensor
    target: Tensor
    examples: int | None = None
    others: tuple["HeldOut", ...] = ()

    @property
    def n(self) -> int:
        """Number of examples, the others included."""
        own = len(self.mean) if self.examples is None else self.examples
        return own + sum(other.n for other in self.others)

    def at(self, kappa: float, temperature: float) -> "HeldOut":
        """The outputs divided by τ, with their covariance times κ."""
        return replace(
            self,
            mean=self.mean / temperature,
            covariance=kappa / temperature**2 * self.covariance,
            others=tuple(other.at(kappa, temperature) for other in self.others),
        )

    def to(self, device: torch.device | str) -> "HeldOut":
        """The same on a device."""
        tensors = {
            name: getattr(self, name).to(device) for name in ("mean", "covariance", "target")
        }
        return replace(self, **tensors)

    @classmethod
    def joined(cls, parts: Sequence["HeldOut"]) -> "HeldOut":
        """The points of several batches, whose sequences may be padded to lengths of their own.

        Each row is predicted on its own: where lengths differ, rows take the place of examples.
        """
        by_width: dict[int, list[HeldOut]] = {}
        for part in parts:
            by_width.setdefault(part.mean.shape[-1], []).append(part)
        first, *others = (cls._of_one_width(same) for same in by_width.values())
        return replace(first, others=tuple(others))

    @classmethod
    def _of_one_width(cls, parts: Sequence["HeldOut"]) -> "HeldOut":
        if len({part.mean.shape[1] for part in parts}) == 1:
            return cls._stacked(parts)
        rows = cls._stacked([part._by_row() for part in parts])
        return replace(rows, examples=sum(part.n for part in parts))

    @classmethod
    def _stacked(cls, parts: Sequence["HeldOut"]) -> "HeldOut":
        return cls(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.covariance for part in parts]),
            torch.cat([part.target for part in parts]),
        )

    def _by_row(self) -> "HeldOut":
        """Each row (1, c) in place of an example."""
        tensors = (self.mean, self.covariance, self.target)
        mean, covariance, target = (tensor.flatten(0, 1)[:, None] for tensor in tensors)
        return HeldOut(mean, covariance, target)


def validation_points(
    posterior: Posterior, loader: Iterable[Any], key_y: str, where: str = "loader"
) -> HeldOut:
    """Output moments on a loader of held-out data, in float64.

    Where the posterior is that of several processes, and the loader one's part, of all parts.

    Args:
        posterior: predicts by its linearisation.
        loader: batches as `fit` takes them.
        key_y: name of the targets in mappings.
        where: what errors call the loader.

    Raises:
        InvalidValue: there is no batch.
    """
    ranks = ranks_reading(posterior.ggn.options.process_group, loader)
    part = loader if ranks is None else own_part(loader, ranks)
    return points_of_parts(posterior, part, key_y, ranks, where)


def points_of_parts(
    posterior: Posterior,
    part: Iterable[Any],
    key_y: str,
    ranks: Ranks | None,
    where: str = "loader",
) -> HeldOut:
    """The same of this process's part, and of those of all others where there are some.

    Args:
        posterior: as for `validation_points`, like what is not named here.
        part: batches.
        key_y: name of the targets in mappings.
        ranks: the processes that read parts; None: the part is all data.
        where: what errors call the loader.
    """
    if ranks is None:
        parts = _points(posterior, part, key_y)
    else:
        told = ranks.gathered(lambda: [p.to("cpu") for p in _points(posterior, part, key_y)])
        parts = [own.to(posterior.device) for every in told for own in every]
    if not parts:
        raise InvalidValue(
            "the loader yielded no batch",
            where=where,
            got="0 batches",
            remedy="A generator can be read only once: pass a loader",
        )
    return HeldOut.joined(parts)


def _points(posterior: Posterior, loader: Iterable[Any], key_y: str) -> list[HeldOut]:
    """The points of each batch."""
    network, likelihood = posterior.network, posterior.ggn.likelihood
    parts = []
    with draws_kept():
        for raw in loader:
            x, y = split_batch(raw, key_y, posterior.ggn.options.batch_fn)
            batch, y = counted(posterior, x, y), y.to(network.device)
            outputs = output_gaussian(posterior, batch).double()
            axis = posterior.ggn.knowledge.class_axis
            target = aligned_target(likelihood, y, outputs.shape, outputs.mean, axis)
            parts.append(HeldOut(outputs.mean, outputs.covariance, target))
    return parts


def negative_log_likelihood(
    likelihood: Likelihood,
    points: HeldOut,
    sigma: Tensor,
    kappa: float,
    link: str = "probit",
    seed: int = 0,
) -> float:
    """Mean loss of the predictive over the points with the covariance times κ.

    The loss is −log p(y) with the likelihood's weights, ignored labels left out. Label smoothing is
    left out too: it is a means of training, not what predictions are asked for. Where the
    predictive is an average over draws of several outputs, they are the same for every κ.

    Args:
        likelihood: p(y | f).
        points: held-out outputs, with their targets.
        sigma: observation noise σ.
        kappa: factor on their covariance.
        link: how class probabilities come from the Gaussian.
        seed: of the points or draws that averages take.

    Raises:
        InvalidValue: no target counts, or the loss is no number.
    """
    total = 0.0
    for part in (points, *points.others):
        latent = Latent(part.mean, kappa * part.covariance, seed=seed)
        log_prob = likelihood.predict(latent, sigma, link).log_prob(part.target)
        total -= float(log_prob.sum())
    if math.isnan(total):
        raise InvalidValue(
            "the predictive NLL is no number",
            where="held-out points",
            got=f"NaN at κ = {kappa:.3g}",
            remedy="Look for NaN among inputs and targets, and at σ and prior_precision",
        )
    return total / points.n
