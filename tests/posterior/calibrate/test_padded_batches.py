"""Sequences padded batch by batch calibrate as the same data padded to one length do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.posterior.calibrate.held_out import (
    HeldOut,
    negative_log_likelihood,
    validation_points,
)
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points

Batch = tuple[Tensor, Tensor]
ONE = torch.ones((), dtype=torch.float64)


class Tokens(nn.Module):
    """Each token on its own, so that padding is of no consequence; `end` shapes the output."""

    def __init__(self, outputs: int, end: Callable[[Tensor], Tensor] = lambda f: f):
        super().__init__()
        self.first, self.last, self.end = nn.Linear(4, 5), nn.Linear(5, outputs), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.first(x).tanh()))


def made(lengths: tuple[int, ...] = (3, 2, 1, 3, 2, 4, 4, 1, 2)) -> list[Batch]:
    """Sequences of tokens (t, 4) with a label each."""
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(t, 4, generator=draw).double(), torch.randint(0, 3, (t,), generator=draw))
        for t in lengths
    ]


def padded(sequences: list[Batch], length: int | None = None) -> Batch:
    """Zeros and ignored labels behind each sequence."""
    t = max(len(x) for x, _ in sequences) if length is None else length
    x = torch.stack([F.pad(x, (0, 0, 0, t - len(x))) for x, _ in sequences])
    y = torch.stack([F.pad(y, (0, t - len(y)), value=-100) for _, y in sequences])
    return x, y


def both(sequences: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches of 5 padded to their own longest, and to the longest of all."""
    parts = [sequences[k : k + 5] for k in range(0, len(sequences), 5)]
    own = [padded(part) for part in parts]
    assert [x.shape[1] for x, _ in own] == [3, 4]
    return own, [padded(part, 4) for part in parts]


def fitted(batches: list[Batch], structure: str, end: Callable = lambda f: f) -> Laplace:
    torch.manual_seed(0)
    return Laplace(Tokens(3, end).double(), hessian_structure=structure).fit(batches)


structures = pytest.mark.parametrize("structure", ["kron", "diag", "full"])
ENDS = {"classes last": lambda f: f, "classes second": lambda f: f.mT}
ends = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)


@ends
@structures
@pytest.mark.parametrize("method", ["loo", "validation"])
def test_scales_are_those_of_one_padding(method, structure, end):
    own, common = both(made())
    scales = []
    for batches in (own, common):
        la = fitted(common, structure, end)
        loader = batches if method == "validation" else None
        if method == "loo":
            la.calibrate(batches, method)
        else:
            la.calibrate(loader, method)
        scales.append(float(la.posterior_scale))
    assert scales[0] == pytest.approx(scales[1], rel=1e-6, abs=1e-12)


@ends
@structures
@pytest.mark.parametrize("kappa", [0.0, 0.3, 2.0])
def test_losses_are_those_of_the_rows_that_count(kappa, structure, end):
    """Against −log p of each label by its own prediction, over the number of sequences."""
    own, common = both(made())
    la = fitted(common, structure, end)
    want = 0.0
    for x, y in own:
        predictive = la.predict(x)
        mean, covariance = predictive.mean_f, predictive.covariance_f
        variance = kappa * covariance.diagonal(dim1=-2, dim2=-1)
        log_p = (mean / (1 + torch.pi / 8 * variance).sqrt()).log_softmax(-1)
        want += float(F.nll_loss(log_p.flatten(0, 1), y.flatten(), reduction="sum")) / 9
    got = [
        negative_log_likelihood(
            la.likelihood, validation_points(la.posterior, b, "labels"), ONE, kappa
        )
        for b in (own, common)
    ]
    assert got == pytest.approx([want, want], rel=1e-12)


@ends
@structures
def test_left_out_moments_are_those_of_one_padding(structure, end):
    own, common = both(made())
    la = fitted(common, structure, end)
    points, want = (
        leave_one_out_points(la.posterior, batches, "labels", 0) for batches in (own, common)
    )
    kept = want.target.flatten() >= 0
    mine = points.target.flatten() >= 0
    assert points.n == want.n == 9 and kept.sum() == mine.sum()
    for got, whole in (
        (points.mean, want.mean),
        (points.covariance, want.covariance),
        (points.target[..., None], want.target[..., None]),
    ):
        torch.testing.assert_close(
            got.flatten(0, 1)[mine], whole.flatten(0, 1)[kept], rtol=1e-8, atol=1e-10
        )


@structures
def test_grid_search(structure):
    own, common = both(made())
    chosen = []
    for batches in (own, common):
        la = fitted(common, structure)
        la.optimize_prior("gridsearch", val_loader=batches, grid=[0.03, 0.1, 0.3, 1, 3, 10])
        chosen.append(la.prior_precision.clone())
    assert torch.equal(*chosen)


def test_a_batch_of_ignored_labels_does_not_count():
    own, common = both(made())
    ignored = torch.zeros(2, 7, 4).double(), torch.full((2, 7), -100)
    la = fitted(common, "kron")
    losses = [
        negative_log_likelihood(la.likelihood, points, ONE, 0.5) * points.n
        for points in (
            validation_points(la.posterior, batches, "labels")
            for batches in (own, [*own, ignored], [ignored, *own])
        )
    ]
    assert losses == pytest.approx(3 * losses[:1], rel=1e-12)


def values(kind: str, outputs: int) -> list[Batch]:
    """Batches of different lengths with a target for each output."""
    draw, batches = torch.Generator().manual_seed(1), []
    for n, t in ((5, 3), (4, 4), (1, 1)):
        x = torch.randn(n, t, 4, generator=draw).double()
        y = torch.rand(n, t, outputs, generator=draw).double()
        batches.append((x, y.round() if kind in ("binary", "poisson") else y))
    return batches


@pytest.mark.slow
@structures
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "one number a token"])
@pytest.mark.parametrize("kind", ["regression", "binary", "poisson"])
def test_values_at_positions(kind, flat, structure):
    """(n, t, c), and (n, t) whose rows have t outputs: the loss is that of the batches alone."""
    outputs = 1 if flat else 2
    torch.manual_seed(0)
    model = Tokens(outputs, (lambda f: f[..., 0]) if flat else lambda f: f).double()
    batches = values(kind, outputs)
    if flat:
        batches = [(x, y[..., 0]) for x, y in batches]
    la = Laplace(model, kind, hessian_structure=structure).fit(batches)
    la.calibrate(batches, "validation")
    points = validation_points(la.posterior, batches, "labels")
    alone = [validation_points(la.posterior, [batch], "labels") for batch in batches]
    sigma = la.sigma_noise
    if kind == "regression":  # the others average over draws where a row has several outputs
        got = negative_log_likelihood(la.likelihood, points, sigma, 0.7) * points.n
        want = [negative_log_likelihood(la.likelihood, p, sigma, 0.7) * p.n for p in alone]
        assert got == pytest.approx(sum(want), rel=1e-12)
    assert points.n == 10
    la.optimize_prior("gridsearch", val_loader=batches, grid=[0.1, 1.0])
    la.calibrate(batches, "loo")
    assert torch.isfinite(la.posterior_scale)


def test_points_of_one_length_stay_as_they_are():
    draw = torch.Generator().manual_seed(0)
    parts = [
        HeldOut(
            torch.randn(n, 2, 3, generator=draw), torch.rand(n, 2, 3, 3), torch.zeros(n, 2).long()
        )
        for n in (2, 3)
    ]
    joined = HeldOut.joined(parts)
    assert joined.mean.shape == (5, 2, 3) and joined.n == 5 and not joined.others
    assert torch.equal(joined.mean, torch.cat([part.mean for part in parts]))
