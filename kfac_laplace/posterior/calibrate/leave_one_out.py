"""Outputs at training points as if each had been left out, without refitting.

With Σ the posterior covariance of a point's outputs, Λ their curvature and g = ∂(−log p)/∂f (both
with the likelihood's scale), linearised leave-one-out gives Σ₋ₙ = Σ (I − ΛΣ)⁻¹ and
f₋ₙ = f + Σ₋ₙ g. That needs the leverages ΛΣ below 1, which holds for the exact GGN alone: a
block-diagonal or Kronecker posterior is too wide in directions that the data determine jointly, and
its leverages exceed 1. So the points looked at enter by their exact Gauss-Newton curvature, all
parameters together, in the dual form Σ = K − K (K + Λ⁻¹)⁻¹ K, and only the other data, where
they are too many to look at all, by curvature of the posterior's own structure.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.accumulate import with_batch
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.model.batches import AnyBatch, split_batch
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.likelihoods import aligned_target
from kfac_laplace.posterior.calibrate.held_out import HeldOut
from kfac_laplace.posterior.calibrate.same_data import check_same_targets, other_data
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.passes import counted
from kfac_laplace.posterior.predict.glm import output_features, output_gaussian
from kfac_laplace.posterior.tiles import pairs_of_tiles
from kfac_laplace.process import draws_kept

log = logging.getLogger("kfac_laplace")

#: Output rows of the points looked at, at most, and entries of their features, at most. No budget:
#: they say how many points are looked at, and so what comes out.
MAX_ROWS = 2048
MAX_FEATURES = 2**27


def leave_one_out_points(
    posterior: Posterior, loader: Iterable[Any], key_y: str, seed: int
) -> HeldOut:
    """Moments of training points' outputs when each point is left out.

    The means come from the exact curvature of the points looked at, and are exact for
    linear-Gaussian models at their mode. The covariances are the posterior's own, which
    predictions use, widened by as much as leaving the point out widens the exact ones.

    Args:
        posterior: the posterior whose scale is asked for.
        loader: its training data.
        key_y: name of the targets in mappings.
        seed: seed of the choice of points where there are too many to look at all.

    Raises:
        InvalidValue: other data than those of the fit, as far as their number and their targets
            tell.
    """
    picked, rest = _divided(posterior, loader, key_y, seed)
    likelihood, sums = posterior.ggn.likelihood, [rest.targets] if rest.n_data else []
    if rest.n_data:
        log.info(
            "leaving out %d of %d points",
            posterior.ggn.n_data - rest.n_data,
            posterior.ggn.n_data,
        )
    axis = posterior.ggn.knowledge.class_axis
    whole, hessians, scores = [], [], []
    for batch, y in picked:
        found = output_gaussian(posterior, batch)
        as_in_fit = aligned_target(likelihood, y, found.shape, found.mean, axis)
        sums.append(likelihood.target_sums(as_in_fit, found.mean))
        outputs = found.double()
        target = aligned_target(likelihood, y, outputs.shape, outputs.mean, axis)
        whole.append(HeldOut(outputs.mean, outputs.covariance, target))
        hessian, score = _scaled(posterior, outputs.mean, target)
        hessians.append(hessian)
        scores.append(score)
    check_same_targets(posterior, sums)
    exact = _exact_covariances(posterior, [batch for batch, _ in picked], hessians, rest)
    parts = zip(whole, exact, hessians, scores, strict=True)
    return HeldOut.joined([_left_out(*part) for part in parts])


def _left_out(points: HeldOut, exact: Tensor, hessian: Tensor, score: Tensor) -> HeldOut:
    """Points with the moments that leaving each of them out makes of theirs.

    Args:
        points: as the posterior predicts them.
        exact: covariance (m, k, k) of the outputs of each, k = t·c.
        hessian: scaled curvature of each, shape (m, k, k).
        score: scaled gradient of each, shape (m, k).
    """
    mean = points.mean
    without, _ = leave_out(exact, hessian)
    shift = (without @ score[..., None])[..., 0]
    widened = _by_row(without, mean).diagonal(dim1=-2, dim2=-1).sum(-1)
    before = _by_row(exact, mean).diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = torch.where(before > 0, widened / before.where(before > 0, 1.0), 1.0)  # (m, t)
    covariance = points.covariance * ratio[..., None, None]
    return HeldOut(mean + shift.reshape(mean.shape), covariance, points.target)


def leave_out(covariance: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance (m, k, k) without each point's own curvature, and the leverages (m, k) < 1.

    Args:
        covariance: Σ, shape (m, k, k), from a posterior that contains each point's curvature.
        hessian: scaled curvature of each point, shape (m, k, k).
    """
    values, basis = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root = basis * values.clamp_min(0).sqrt()[..., None, :]
    leverage, inner = torch.linalg.eigh(root.mT @ hessian @ root)
    # A leverage of 1 up to rounding: the point alone determines that direction.
    remaining = (1 - leverage).clamp_min(torch.finfo(leverage.dtype).eps)
    factor = root @ inner * remaining.rsqrt()[..., None, :]
    return factor @ factor.mT, leverage


def _divided(
    posterior: Posterior, loader: Iterable[Any], key_y: str, seed: int
) -> tuple[list[tuple[AnyBatch, Tensor]], GGN]:
    """The points to look at, batch by batch with their targets, and the curvature of the others."""
    ggn, network = posterior.ggn, posterior.network
    rest, draws = ggn.without_data(), torch.Generator().manual_seed(ggn.options.seed)
    n_data, rows = int(ggn.n_data), min(MAX_ROWS, MAX_FEATURES // posterior.prior.size)
    count = min(n_data, max(1, rows * n_data // int(ggn.n_outputs)))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(n_data, dtype=torch.bool, device="cpu")
    chosen[torch.randperm(n_data, generator=generator, device="cpu")[:count]] = True
    picked, seen = [], 0
    with draws_kept():
        for raw in loader:
            x, y = split_batch(raw, key_y, ggn.options.batch_fn)
            batch = counted(posterior, x, y)
            if len(y) != batch.n:
                raise UnsupportedUse(
                    "leaving out single nodes of a graph is not built",
                    where="calibrate",
                    got=f"{len(y)} targets for {batch.n} graphs",
                    remedy="Use method='validation' with held-out graphs or labels",
                )
            here = chosen[seen : seen + batch.n]
            seen += batch.n
            if seen > n_data:
                break
            looked_at, others = here.nonzero()[:, 0], (~here).nonzero()[:, 0]
            if len(looked_at):
                picked.append(
                    (batch.select(looked_at), y[looked_at.to(y.device)].to(network.device))
                )
            if len(others):
                part = batch.select(others), y[others.to(y.device)]
                rest = with_batch(rest, network, part, draws, posterior.mode_for_model)
    if seen != n_data:
        raise other_data(f"{seen} examples where the fit saw {n_data}")
    return picked, rest


def _scaled(posterior: Posterior, mean: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled D Λ D (m, k, k) and score (m, k) of each point, k = t·c."""
    likelihood, scale = posterior.ggn.likelihood, posterior.scale.detach()
    hyper = posterior.hyperparameters.detached()
    n, t, c = mean.shape
    by_row = scale * likelihood.hessian(mean)  # (m, t, c, c)
    importance = likelihood.importance(target)
    if importance is not None:
        root = importance.to(by_row).sqrt().expand(n, t, c)
        by_row = root[..., :, None] * by_row * root[..., None, :]
    by_row = by_row.movedim(1, -1)  # (m, c, c, t)
    hessian = torch.diag_embed(by_row).permute(0, 3, 1, 4, 2).reshape(n, t * c, t * c)
    score = likelihood.score_with_noise(mean, target, hyper.sigma_noise)
    return hessian, (score / hyper.temperature).flatten(1)


def _exact_covariances(
    posterior: Posterior, batches: list[AnyBatch], hessians: list[Tensor], others: GGN
) -> list[Tensor]:
    """Output covariances (m, k, k) of each batch; the points' own curvature enters exactly."""
    # The other data keep the posterior's structure; without any, the base is the prior alone.
    base = posterior.without_data() if not others.n_data else posterior.with_ggn(others)
    sizes = [len(hessian) * hessian.shape[1] for hessian in hessians]
    kernel = _kernel(base, batches, hessians[0].new_empty(sum(sizes), sum(sizes)))
    roots = torch.block_diag(*(root for hessian in hessians for root in _roots(hessian)))
    inner = roots.mT @ kernel @ roots
    factor = torch.linalg.cholesky(inner + torch.eye(len(inner)).to(inner))
    half = torch.linalg.solve_triangular(factor, roots.mT @ kernel, upper=False)
    covariance = kernel - half.mT @ half
    found, start = [], 0
    for hessian, size in zip(hessians, sizes, strict=True):
        own = covariance[start : start + size, start : start + size]
        (count, k), start = hessian.shape[:2], start + size
        blocks = own.reshape(count, k, count, k).diagonal(dim1=0, dim2=2)  # (k, k, m)
        found.append(blocks.movedim(-1, 0))
    return found


def _roots(hessian: Tensor) -> Tensor:
    """R (m, k, k) with R Rᵀ = H of each point."""
    values, basis = torch.linalg.eigh(hessian)
    return basis * values.clamp_min(0).sqrt()[..., None, :]


def _kernel(base: Posterior, batches: list[AnyBatch], kernel: Tensor) -> Tensor:
    """Fill `kernel` (Σ m k, Σ m k) with the covariances of all points' outputs.

    Features that are too many for the budget are taken a tile of points at a time, and made again
    for each other tile.
    """
    count = sum(batch.n for batch in batches)
    point = -(-len(kernel) // count) * base.prior.size  # entries of a point's features
    limit = base.network.budget.features(kernel)
    tiles = [batches]
    if count * point > limit:
        step = at_once(point, limit // 2)  # of two tiles at a time
        tiles = [[piece] for batch in batches for piece in batch.split(step)]
    ends = [0]
    found = pairs_of_tiles(tiles, lambda tile: _features(base, tile), _products)
    for a, b, product in found:
        if b == 0:
            ends.append(ends[a] + len(product))
        rows, columns = slice(ends[a], ends[a + 1]), slice(ends[b], ends[b + 1])
        kernel[rows, columns] = product
        kernel[columns, rows] = product.mT
    return kernel


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Σ over the blocks of left · rightᵀ, float64."""
    total: Tensor | None = None
    for x, y in zip(left, right, strict=True):
        x64 = x.double()
        product = x64 @ (x64 if y is x else y.double()).mT
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _features(base: Posterior, batches: list[AnyBatch]) -> list[Tensor]:
    """Features (m k, p of the block) of some points, block by block."""
    pieces = [output_features(base, batch) for batch in batches]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


def _by_row(covariance: Tensor, mean: Tensor) -> Tensor:
    """Blocks (m, t, c, c) of covariances (m, k, k)."""
    n, t, c = mean.shape
    rows = covariance.reshape(n, t, c, t, c).diagonal(dim1=1, dim2=3)  # (m, c, c, t)
    return rows.movedim(-1, 1)
