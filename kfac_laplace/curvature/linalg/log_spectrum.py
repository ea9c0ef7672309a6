"""Few numbers in place of many eigenvalues: sums of smooth functions of their logarithms.

The evidence and its gradients are Σ_k f(log v_k) with f(u) = log(1 + e^(u − log δ)), whose
singularities are at a distance of π from the real axis. Interpolation of f on a grid of logarithms
turns the sum over eigenvalues into one over grid points, Σ_j w_j f(x_j), with weights that do not
depend on δ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Grid points in a unit of the logarithm, and those that a value is interpolated from. The error
#: is below 2e-12 for each eigenvalue: that of 6 points is ∏ (j − ½)² / 6! · |f⁽⁶⁾| / DENSITY⁶, and
#: |f⁽⁶⁾| at most 1/4.
DENSITY, POINTS = 32, 6
#: Logarithms so far below the largest are those of zeros.
RANGE = 75.0
#: So few values are kept as they are.
FEW = 4096
#: So many values are spread over the grid at a time.
PIECE = 2**20


@dataclass(frozen=True)
class LogSpectrum:
    """Σ_k f(log v_k) ≈ Σ_j weights_j f(logs_j) over the values v above zero, for smooth f.

    Args:
        logs: grid points, or the logarithms of the values themselves, shape (j,).
        weights: their weights, shape (j,); some may be negative.
    """

    logs: Tensor
    weights: Tensor


def log_spectrum(values: Tensor) -> LogSpectrum:
    """The logarithms of some values in float64, those that are zero left out.

    Args:
        values: any shape, none below zero.
    """
    flat = values.detach().flatten()
    top = flat.max().log() if flat.numel() else flat.new_tensor(-torch.inf)
    if not bool(torch.isfinite(top)):
        return LogSpectrum(flat[:0], flat[:0])
    low = top - RANGE
    if flat.numel() <= FEW:
        logs = flat[flat > low.exp()].log()
        return LogSpectrum(logs, torch.ones_like(logs))
    cells = int(RANGE * DENSITY) + 1
    moments = flat.new_zeros(POINTS, cells)  # Σ tᵏ over the places t of each cell's values
    for piece in flat.split(PIECE):
        places = (piece[piece > low.exp()].log() - low).mul_(DENSITY)
        index = places.long().clamp_max_(cells - 1)
        inside = places.sub_(index)
        power = torch.ones_like(inside)
        for k in range(POINTS):
            moments[k] += torch.bincount(index, power, minlength=cells)
            power *= inside
    # Coefficients (k, j) of Lagrange's polynomials.
    basis = torch.linalg.inv(_powers().to(moments))
    weights = flat.new_zeros(cells + POINTS - 1)
    for j, weight in enumerate(basis.mT @ moments):
        weights[j : j + cells] += weight
    logs = low + (torch.arange(len(weights)).to(flat) - (POINTS // 2 - 1)) / DENSITY
    kept = weights != 0
    return LogSpectrum(logs[kept], weights[kept])


def _powers() -> Tensor:
    """Powers (j, k) of the six places −2, …, 3 around a cell [0, 1)."""
    places = torch.arange(1 - POINTS // 2, POINTS // 2 + 1, dtype=torch.float64, device="cpu")
    return places[:, None] ** torch.arange(POINTS, device="cpu")
