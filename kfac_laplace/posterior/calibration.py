"""The posterior scale κ: the predictive covariance times κ, chosen by predictive likelihood.

Linearised Laplace predictives are underconfident, whatever the structure of H and the link. κ
multiplies the covariance that predictives use, never the evidence; κ = 0 is the mode.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from kfac_laplace.curvature.forward import split_batch
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Bernoulli, Gaussian, Likelihood
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.glm import output_gaussian
from kfac_laplace.posterior.links import probit
from kfac_laplace.priors import positive

log = logging.getLogger("kfac_laplace")

#: Candidates for κ before the search is refined between them; 0 and 1 are always among them.
GRID = torch.logspace(-6, 3, 46, dtype=torch.float64)

#: A point whose leverage reaches 1 determines a direction alone; without it the linearisation
#: says nothing. Approximate curvature can overshoot, so leverages stop short of 1.
MAX_LEVERAGE = 0.99


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
    """Output moments on a loader of held-out data."""
    return _gather(posterior, loader, key_y, lambda outputs, y: (outputs.mean, outputs.by_row))


def leave_one_out_points(posterior: Posterior, loader: Iterable[Any], key_y: str) -> HeldOut:
    """Linearised moments of each training point's outputs when that point is left out.

    With Σ the outputs' posterior covariance, Λ their curvature and g = ∂(−log p)/∂f, both with
    the likelihood's scale: Σ₋ₙ = Σ (I − ΛΣ)⁻¹ and f₋ₙ = f + Σ₋ₙ g. Exact for linear-Gaussian
    models at their mode.
    """
    likelihood, scale = posterior.curvature.likelihood, posterior.scale.detach()
    clipped: list[Tensor] = []

    def moments(outputs: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        f = outputs.mean
        n, t, c = f.shape
        by_row = scale * likelihood.hessian(f).movedim(1, -1)  # (n, c, c, t)
        hessian = torch.diag_embed(by_row).permute(0, 3, 1, 4, 2).reshape(n, t * c, t * c)
        score = (scale * likelihood.score(f, y)).flatten(1)
        covariance, leverage = leave_out(outputs.covariance.double(), hessian)
        clipped.append((leverage > MAX_LEVERAGE).sum())
        mean = f.flatten(1) + (covariance @ score[..., None])[..., 0]
        rows = covariance.reshape(n, t, c, t, c).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return mean.reshape(n, t, c), rows

    points = _gather(posterior, loader, key_y, moments)
    count = int(torch.stack(clipped).sum())
    if count:
        log.info("%d of %d leverages were capped at %.2f", count, points.mean.numel(), MAX_LEVERAGE)
    return points


def leave_out(covariance: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (n, k, k) without each point's own curvature, and the leverages (n, k).

    Args:
        covariance: Σ, shape (n, k, k).
        hessian: scaled Λ, shape (n, k, k).
    """
    values, basis = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root = basis * values.clamp_min(0).sqrt()[..., None, :]
    leverage, inner = torch.linalg.eigh(root.mT @ hessian @ root)
    factor = root @ inner * (1 - leverage.clamp_max(MAX_LEVERAGE)).rsqrt()[..., None, :]
    return factor @ factor.mT, leverage


def best_scale(likelihood: Likelihood, points: HeldOut, sigma: Tensor) -> float:
    """κ ≥ 0 of least negative log predictive likelihood, by a grid refined between neighbours."""

    def loss(kappa: float) -> float:
        return negative_log_likelihood(likelihood, points, sigma, kappa)

    grid = [0.0, *GRID.tolist(), 1.0]
    losses = {kappa: loss(kappa) for kappa in grid}
    best = min(losses, key=losses.__getitem__)
    if best == 0.0:
        return best
    step = float((GRID[1] / GRID[0]).log())
    centre = float(torch.tensor(best, dtype=torch.float64).log())
    found = minimize_scalar(
        lambda z: loss(float(torch.tensor(z, dtype=torch.float64).exp())),
        bounds=(centre - step, centre + step),
        method="bounded",
        options={"xatol": 1e-4},
    )
    refined = float(torch.tensor(found.x, dtype=torch.float64).exp())
    return refined if float(found.fun) < losses[best] else best


def grid_search(
    posterior: Posterior,
    loader: Iterable[Any],
    key_y: str,
    kappa: float,
    grid: Iterable[float] | None = None,
) -> Tensor:
    """The scalar δ of least validation NLL on a grid, 10⁻⁴ … 10⁴ by default, float64.

    Args:
        posterior: its prior precisions are all replaced by each candidate.
        loader: validation data; read once for each candidate.
        key_y: name of the targets in mappings.
        kappa: posterior scale κ of the predictive.
        grid: candidates.
    """
    values = torch.logspace(-4, 4, 21).tolist() if grid is None else list(grid)
    candidates = [positive(value, "grid", posterior.device) for value in values]
    if not candidates:
        raise InvalidValue("no candidates", where="grid", got="an empty grid")
    batches = list(loader)
    hyper = posterior.hyperparameters.detached()
    losses = []
    for delta in candidates:
        moved = posterior.at(replace(hyper, prior_precision=posterior.prior.full(delta)))
        points = validation_points(moved, batches, key_y)
        losses.append(
            negative_log_likelihood(
                posterior.curvature.likelihood, points, hyper.sigma_noise, kappa
            )
        )
    return candidates[losses.index(min(losses))]


def negative_log_likelihood(
    likelihood: Likelihood, points: HeldOut, sigma: Tensor, kappa: float
) -> float:
    """Mean −log p(y) over the points with the covariance times κ, by the probit link."""
    mean, covariance, y = points.mean, kappa * points.covariance, points.target
    if isinstance(likelihood, Gaussian):
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        total = covariance + sigma.to(mean) ** 2 * eye
        normal = torch.distributions.MultivariateNormal(mean, total)
        return -float(normal.log_prob(y).sum()) / len(mean)
    probs = probit(likelihood, mean, covariance)
    tiny = torch.finfo(probs.dtype).tiny
    if isinstance(likelihood, Bernoulli):
        # Products of the logits keep the complement's digits: 1 − p loses them.
        other = probit(likelihood, -mean, covariance)
        terms = y * probs.clamp_min(tiny).log() + (1 - y) * other.clamp_min(tiny).log()
        return -float(terms.sum()) / len(mean)
    picked = probs.gather(-1, y[..., None]).clamp_min(tiny)
    return -float(picked.log().sum()) / len(mean)


def _gather(
    posterior: Posterior,
    loader: Iterable[Any],
    key_y: str,
    moments: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
) -> HeldOut:
    """Moments of every batch, one after another, in float64."""
    network, likelihood = posterior.curvature.network, posterior.curvature.likelihood
    means, covariances, targets = [], [], []
    for batch in loader:
        x, y = split_batch(batch, key_y)
        outputs = output_gaussian(posterior, x)
        y = likelihood.align_target(y.to(network.device), outputs.mean)
        y = y.double() if y.is_floating_point() else y
        mean, covariance = moments(outputs.double(), y)
        means.append(mean)
        covariances.append(covariance)
        targets.append(y)
    if not means:
        raise InvalidValue(
            "the loader yielded no batch",
            where="loader",
            got="0 batches",
            remedy="A generator can be read only once: pass a loader",
        )
    return HeldOut(torch.cat(means), torch.cat(covariances), torch.cat(targets))
