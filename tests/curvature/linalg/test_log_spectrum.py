"""Sums over grid points equal sums over eigenvalues."""

from __future__ import annotations

import pytest
import torch
from laws import relative_error
from torch import Tensor, nn
from torch.nn.functional import softplus

from kfac_laplace import Laplace
from kfac_laplace.curvature.linalg.log_spectrum import FEW, log_spectrum

# Interpolation is off by 2e-12 for each value at most, with either sign; summation by rounding.
CLOSE = 1e-12

SPREADS = {
    "narrow": lambda n: 1 + 1e-3 * torch.rand(n),
    "wide": lambda n: (6 * torch.randn(n)).exp(),
    "with zeros": lambda n: (3 * torch.randn(n)).exp() * (torch.arange(n) % 3 > 0),
    "all the same": lambda n: torch.full((n,), 0.37),
    "one large": lambda n: torch.cat([torch.tensor([1e12]), torch.rand(n - 1)]),
    "powers of the grid": lambda n: ((torch.arange(n) % 64).double() / 32).exp(),
    "zero": lambda n: torch.zeros(n),
}


def spread(name: str, n: int) -> Tensor:
    torch.manual_seed(0)
    return SPREADS[name](n).double()


@pytest.mark.parametrize("delta", [1e-8, 1e-2, 1.0, 50.0, 1e8])
@pytest.mark.parametrize("n", [1, FEW, FEW + 1, 30_000])
@pytest.mark.parametrize("name", SPREADS)
def test_log_determinants_and_their_slopes(name, n, delta):
    values = spread(name, n)
    found = log_spectrum(values)
    shift = torch.tensor(delta, dtype=torch.float64).log()
    want = (values / delta).log1p().sum()
    got = (found.weights * softplus(found.logs - shift, threshold=40)).sum()
    torch.testing.assert_close(got, want, rtol=CLOSE, atol=CLOSE * n)
    want = (values / (values + delta)).sum()
    got = (found.weights * (found.logs - shift).sigmoid()).sum()
    torch.testing.assert_close(got, want, rtol=CLOSE, atol=CLOSE * n)


def test_few_points_stand_for_many_values():
    assert len(log_spectrum(spread("wide", 300_000)).logs) < 2600


def test_pieces_change_nothing(monkeypatch):
    values = spread("with zeros", 30_000)
    whole = log_spectrum(values)
    monkeypatch.setattr("kfac_laplace.curvature.linalg.log_spectrum.PIECE", 1000)
    parts = log_spectrum(values)
    assert torch.equal(parts.logs, whole.logs)
    assert relative_error(parts.weights, whole.weights) < CLOSE


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("sharing", ["scalar", "layerwise"])
def test_the_evidence_of_large_blocks(structure, sharing):
    """Blocks above and below the size from which values are spread over a grid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 3)).double()
    x, y = torch.randn(50, 70).double(), torch.randint(3, (50,))
    options = {"hessian_structure": structure, "prior_structure": sharing}
    la = Laplace(model, "classification", temperature=0.7, **options).fit([(x, y)])
    assert [block.layout.size > FEW for block in la.curvature.blocks.values()] == [True, False]
    log_delta = torch.zeros(len(la.prior_precision), dtype=torch.float64, requires_grad=True)
    want = sum(normal.log_det_ratio() for normal in la.posterior.blocks.values())
    torch.testing.assert_close(la.log_det_ratio, want, rtol=CLOSE, atol=0)
    (slope,) = torch.autograd.grad(la.log_marginal_likelihood(log_delta.exp()), log_delta)
    dimensions = [normal.effective_dimensions() for normal in la.posterior.blocks.values()]
    gamma = torch.stack([share.sum() for share in dimensions])
    if sharing == "scalar":
        gamma = gamma.sum().reshape(1)
    expected = 0.5 * (gamma - la.posterior.squares)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-11)
