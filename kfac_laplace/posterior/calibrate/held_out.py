"""Predicted outputs of held-out points with their targets, and how well they are predicted."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Latent, Likelihood, aligned_target
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.glm import output_gaussian


@dataclass(frozen=True)
class HeldOut:
    """Outputs predicted for points that the prediction did not see, with their targets.

    Args:
        mean: shape (n, t, c).
        covariance: of each output row at κ = 1, shape (n, t, c, c).
        target: aligned targets.
    """

    mean: Tensor
    covariance: Tensor
    target: Tensor


def validation_points(posterior: Posterior, loader: Iterable[Any], key_y: str) -> HeldOut:
    """Output moments on a loader of held-out data, in float64.

    Args:
        posterior: predicts by its linearisation.
        loader: batches as `fit` takes them.
        key_y: name of the targets in mappings.
    """
    network, likelihood = posterior.network, posterior.ggn.likelihood
    means, covariances, targets = [], [], []
    for raw in loader:
        x, y = split_batch(raw, key_y, posterior.ggn.options.batch_fn)
        outputs = output_gaussian(posterior, network.batch(x)).double()
        means.append(outputs.mean)
        covariances.append(outputs.covariance)
        axis = posterior.ggn.knowledge.class_axis
        y = y.to(network.device)
        targets.append(aligned_target(likelihood, y, outputs.shape, outputs.mean, axis))
    if not means:
        raise InvalidValue(
            "the loader yielded no batch",
            where="loader",
            got="0 batches",
            remedy="A generator can be read only once: pass a loader",
        )
    return HeldOut(torch.cat(means), torch.cat(covariances), torch.cat(targets))


def negative_log_likelihood(
    likelihood: Likelihood, points: HeldOut, sigma: Tensor, kappa: float
) -> float:
    """Mean loss of the predictive over the points with the covariance times κ, by the probit link.

    The loss is −log p(y) with the likelihood's weights, ignored labels left out. Label smoothing is
    left out too: it is a means of training, not what predictions are asked for. Where the
    predictive is an average over draws of several outputs, they are the same for every κ.

    Raises:
        InvalidValue: no target counts.
    """
    latent = Latent(points.mean, kappa * points.covariance)
    log_prob = likelihood.predict(latent, sigma, "probit").log_prob(points.target)
    return -float(log_prob.sum()) / len(points.mean)
