"""The posterior of all parameters under a low-rank GGN, by inner products of its rows.

With W = √scale R D^{-½} (k, p) and I + W Wᵀ = L Lᵀ it is (D^{½} (I + WᵀW) D^{½})⁻¹. The matrix
C = I − Wᵀ L⁻ᵀ (L + I)⁻¹ W has C Cᵀ = (I + WᵀW)⁻¹: nothing is made of size (p, p).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from kfac_laplace.curvature.linalg.leading import combined, inner


@dataclass(frozen=True)
class LowRankNormal:
    """N(θ*, (scale · RᵀR + diag δ)⁻¹) under any diagonal prior.

    Args:
        rows: R (k, p) in parameter order, in any precision.
        factor: L (k, k), lower, of I + scale · R diag(1/δ) Rᵀ.
        scale: likelihood precision 1/(σ²T), shape ().
        delta: prior precision of each entry, shape (p,).
    """

    rows: Tensor
    factor: Tensor
    scale: Tensor
    delta: Tensor

    def log_det_ratio(self) -> Tensor:
        """2 Σ log of the factor's diagonal: log det(I + WᵀW) = log det(I + W Wᵀ)."""
        return 2 * self.factor.diagonal().log().sum()

    def effective_dimensions(self) -> Tensor:
        """1 − δ_i [P⁻¹]_ii = Σ_k [L⁻¹ W]_ki², shape (1, 1, p)."""
        eye = torch.eye(len(self.factor), dtype=self.factor.dtype, device=self.factor.device)
        whitened = combined(solve_triangular(self.factor, eye, upper=False), self.rows)
        return (self.scale / self.delta * whitened.square().sum(0))[None, None]

    def colour(self, noise: Tensor) -> Tensor:
        """D^{-½} C noise."""
        flat = noise[:, 0, 0]  # (s, p)
        met = inner(flat * self._root, self.rows).mT  # (k, s)
        first = solve_triangular(self._raised, met, upper=False)
        last = solve_triangular(self.factor.mT, first, upper=True)
        return (self._without(flat, last) * self.delta.rsqrt())[:, None, None]

    def features(self, gradients: Tensor) -> Tensor:
        """g D^{-½} C."""
        flat = (gradients.flatten(-3) * self.delta.rsqrt()).flatten(0, -2)  # (m, p)
        met = inner(flat * self._root, self.rows).mT  # (k, m)
        first = solve_triangular(self.factor, met, upper=False)
        last = solve_triangular(self._raised.mT, first, upper=True)
        return self._without(flat, last).reshape(*gradients.shape[:-3], -1)

    @property
    def _root(self) -> Tensor:
        """√(scale/δ), by which columns of R become those of W."""
        return (self.scale / self.delta).sqrt()

    @property
    def _raised(self) -> Tensor:
        """L + I."""
        return self.factor + torch.eye(
            len(self.factor), dtype=self.factor.dtype, device=self.factor.device
        )

    def _without(self, flat: Tensor, weights: Tensor) -> Tensor:
        """Vectors (m, p) without Wᵀ weights, of weights (k, m)."""
        return torch.addcmul(flat, combined(weights.mT, self.rows), self._root, value=-1)

    def squared_norm(self, deviation: Tensor) -> Tensor:
        """Σ δ d² + scale |R d|²."""
        flat = deviation.reshape(1, -1)
        met = inner(flat, self.rows)
        return (self.delta * flat.square()).sum() + self.scale * met.square().sum()

    def cast(self, dtype: torch.dtype) -> "LowRankNormal":
        """Factorised in float64, used in `dtype`."""
        rows, factor, scale, delta = self.rows, self.factor, self.scale, self.delta
        return LowRankNormal(rows.to(dtype), factor.to(dtype), scale.to(dtype), delta.to(dtype))

    def on(self, device: torch.device) -> "LowRankNormal":
        """As it is: a block of all parameters is where the model is."""
        return self
