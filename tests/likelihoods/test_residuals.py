"""Sums of log(1 + r²/s) from a table of residuals."""

from __future__ import annotations

import pytest
import torch

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.residuals import residual_table, sum_of_logs


def residuals(spread, n=2000):
    draw = torch.Generator().manual_seed(0)
    return spread * torch.randn(n, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("spread", [1e-8, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_the_table_gives_the_sum_and_its_slopes(spread, scale):
    """Each of 2000 residuals to 1e-13 and to rounding; by log s, twice."""
    r = residuals(spread)
    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    sums = []
    for value in (
        sum_of_logs(residual_table(r), log_scale),
        torch.log1p(r.square() / log_scale.exp()).sum(),
    ):
        (slope,) = torch.autograd.grad(value, log_scale, create_graph=True)
        (curve,) = torch.autograd.grad(slope, log_scale)
        sums.append(torch.stack([value.detach(), slope.detach(), curve]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-11, atol=2000 * 1e-13)


def test_tables_add():
    r = residuals(1.0)
    whole, parts = residual_table(r), residual_table(r[:7]) + residual_table(r[7:])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert float(whole.sum()) == pytest.approx(2000, rel=1e-12)


def test_residuals_of_zero_count_as_the_smallest():
    zeros, unit = torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    assert float(sum_of_logs(residual_table(zeros), unit)) < 1e-40
    assert float(sum_of_logs(unit, unit)) == 0  # no data


def test_the_largest_residuals():
    big = torch.tensor([5e21, -5e21], dtype=torch.float64)
    log_scale = torch.zeros((), dtype=torch.float64)
    want = torch.log1p(big.square()).sum()
    torch.testing.assert_close(sum_of_logs(residual_table(big), log_scale), want)
    with pytest.raises(InvalidValue, match="too large"):
        residual_table(2 * big)
