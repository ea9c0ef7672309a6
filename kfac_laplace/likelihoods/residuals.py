"""Σ_n log(1 + r_n²/s) at any scale s, from a table of residuals of fixed length that adds with +.

With u = log r² the terms are log(1 + e^(u − log s)), smooth functions of u whose singularities are
at a distance of π from the real axis. Interpolated between points of a grid, the sum over residuals
is one over grid points, Σ_j w_j log(1 + e^(x_j − log s)), with weights that do not depend on s. The
grid is the same for all data, so that the weights of batches add up.
"""

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue

#: Logarithms of squared residuals, from e^−50 to e^50 as residuals; smaller ones count as e^−50,
#: which is seen by scales alone that are smaller still.
RANGE = 100.0
#: Grid points in a unit of the logarithm, and those that a residual is interpolated from. The error
#: of 12 points is ∏ (j − ½)² / 12! · |f⁽¹²⁾| / DENSITY¹² with |f⁽¹²⁾| ≤ 2 · 11!/π¹²: below 1e-13.
DENSITY, POINTS = 8, 12


def residual_table(residuals: Tensor) -> Tensor:
    """Weights (j,) of the grid points, float64.

    Args:
        residuals: r, any shape.

    Raises:
        InvalidValue: residuals above e^50.
    """
    squares = residuals.detach().double().square().flatten()
    if not bool((squares <= 2.6e43).all()):  # e^100
        raise InvalidValue(
            "residuals are too large for any scale",
            where="target",
            got=f"a residual of {float(residuals.abs().max()):.3g}",
            remedy="Standardise the targets",
        )
    floor = torch.full_like(squares, -RANGE).exp()
    places = (squares.maximum(floor).log().clamp_max(RANGE) + RANGE) * DENSITY
    first = places.long()  # of the cell
    inside = (places - first)[:, None] - _nodes().to(places)  # (n, points)
    # Lagrange's polynomials: the products of all differences but one, from both sides.
    ones = torch.ones_like(inside[:, :1])
    before = torch.cat([ones, inside[:, :-1]], 1).cumprod(1)
    after = torch.cat([ones, inside.flip(1)[:, :-1]], 1).cumprod(1).flip(1)
    weights = before * after / _denominators().to(places)
    table = places.new_zeros(int(2 * RANGE * DENSITY) + POINTS)
    index = first[:, None] + torch.arange(POINTS, device=places.device)
    return table.index_add(0, index.flatten(), weights.flatten())


def sum_of_logs(table: Tensor, log_scale: Tensor) -> Tensor:
    """Σ_n log(1 + r_n²/s), differentiable in log s, shape ().

    Args:
        table: weights (j,), or zero for no data.
        log_scale: log s, shape ().
    """
    steps = torch.arange(int(2 * RANGE * DENSITY) + POINTS, device=table.device)
    logs = (steps + _nodes()[0].to(table)) / DENSITY - RANGE
    signal = logs - log_scale.to(table)
    return (table * torch.logaddexp(signal, torch.zeros_like(signal))).sum()


def _nodes() -> Tensor:
    """Places of the points around a cell [0, 1)."""
    return torch.arange(1 - POINTS // 2, POINTS // 2 + 1, dtype=torch.float64, device="cpu")


def _denominators() -> Tensor:
    """∏_{m ≠ j} (x_j − x_m)."""
    apart = _nodes()[:, None] - _nodes()
    return (apart + torch.eye(POINTS, dtype=torch.float64, device="cpu")).prod(1)
