"""The posterior of one block, N(θ*, (scale · H + δ)⁻¹): log-determinants, samples, variances."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.spectrum import Spectrum
from kfac_laplace.errors import InvalidValue


class BlockNormal(Protocol):
    """What the evidence and the predictives ask of a block."""

    def log_det_ratio(self) -> Tensor:
        """log det P − log det P₀, shape ()."""

    def effective_dimensions(self) -> Tensor:
        """Share of each direction that the data determine, shape (b, o, i)."""

    def colour(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise (s, b, o, i) into samples of N(0, P⁻¹)."""

    def features(self, gradients: Tensor) -> Tensor:
        """φ with φ φᵀ = g P⁻¹ gᵀ for gradients g (..., b, o, i), shape (..., k)."""

    def squared_norm(self, deviation: Tensor) -> Tensor:
        """⟨d, P d⟩ of a deviation d (b, o, i) from the mode, shape ()."""

    def cast(self, dtype: torch.dtype) -> "BlockNormal":
        """The same in the precision of a model's gradients, for predictives."""

    def on(self, device: torch.device) -> "BlockNormal":
        """The same with all of it on a device."""


@dataclass(frozen=True)
class SpectralNormal:
    """A block with a spectrum and a prior that is constant on it, or diagonal as the block is.

    Args:
        spectrum: eigenvalues and bases of H.
        scale: likelihood precision 1/(σ²T), shape ().
        delta: prior precision, broadcastable to the eigenvalues.
    """

    spectrum: Spectrum
    scale: Tensor
    delta: Tensor

    def log_det_ratio(self) -> Tensor:
        """Σ log(1 + scale · value/δ)."""
        return self.spectrum.log_det_ratio(self.scale, self.delta)

    def effective_dimensions(self) -> Tensor:
        """scale · value/(scale · value + δ)."""
        return self.spectrum.effective_dimensions(self.scale, self.delta)

    @cached_property
    def deviations(self) -> Tensor:
        """Posterior standard deviation of each eigendirection, (b, o, i)."""
        return self.spectrum.variances(self.scale, self.delta).sqrt()

    def colour(self, noise: Tensor) -> Tensor:
        """Scale in the eigenbasis and rotate back."""
        return self.spectrum.from_eigenbasis(noise * self.deviations)

    def features(self, gradients: Tensor) -> Tensor:
        """Rotate into the eigenbasis and scale."""
        return (self.spectrum.to_eigenbasis(gradients) * self.deviations).flatten(-3)

    def squared_norm(self, deviation: Tensor) -> Tensor:
        """Σ (scale · value + δ) d² in the eigenbasis."""
        return (self.spectrum.to_eigenbasis(deviation) / self.deviations).square().sum()

    def cast(self, dtype: torch.dtype) -> "SpectralNormal":
        """Bases and eigenvalues in `dtype`; decomposed in float64 all the same."""
        return SpectralNormal(self.spectrum.to(dtype), self.scale.to(dtype), self.delta.to(dtype))

    def on(self, device: torch.device) -> "SpectralNormal":
        """Eigenvalues and bases that lie elsewhere moved."""
        moved = self.spectrum.to(device)
        return self if moved is self.spectrum else replace(self, spectrum=moved)


@dataclass(frozen=True)
class DenseNormal:
    """A dense block under any diagonal prior, by a Cholesky factor.

    Args:
        factor: lower factor (p, p) of D^{-½} P D^{-½}, D = diag δ: well scaled whatever δ is.
        delta: prior precision of each entry, shape (p,).
    """

    factor: Tensor
    delta: Tensor

    @classmethod
    def of(cls, matrix: Tensor, scale: Tensor, delta: Tensor) -> "DenseNormal":
        """The posterior of a block H.

        Args:
            matrix: H (p, p) in parameter order.
            scale: likelihood precision 1/(σ²T), shape ().
            delta: prior precision of each entry, shape (p,).

        Raises:
            InvalidValue: P is not positive definite.
        """
        root = delta.rsqrt()
        scaled = scale * matrix * root[:, None] * root
        eye = torch.eye(len(root), dtype=scaled.dtype, device=scaled.device)
        factor, info = torch.linalg.cholesky_ex(scaled + eye)
        if int(info):
            raise InvalidValue("posterior precision is not positive definite", where="full block")
        return cls(factor, delta)

    def log_det_ratio(self) -> Tensor:
        """2 Σ log of the factor's diagonal."""
        return 2 * self.factor.diagonal().log().sum()

    def effective_dimensions(self) -> Tensor:
        """1 − δ_i [P⁻¹]_ii, shape (1, 1, p)."""
        return (1 - torch.cholesky_inverse(self.factor).diagonal())[None, None]

    def colour(self, noise: Tensor) -> Tensor:
        """D^{-½} L⁻ᵀ noise."""
        solved = torch.linalg.solve_triangular(self.factor.mT, noise[:, 0, 0].mT, upper=True)
        return (solved.mT * self.delta.rsqrt())[:, None, None]

    def features(self, gradients: Tensor) -> Tensor:
        """L⁻¹ D^{-½} g."""
        scaled = (gradients.flatten(-3) * self.delta.rsqrt()).flatten(0, -2)  # (k, p)
        solved = torch.linalg.solve_triangular(self.factor, scaled.mT, upper=False)
        return solved.mT.reshape(*gradients.shape[:-3], -1)

    def squared_norm(self, deviation: Tensor) -> Tensor:
        """|Lᵀ D^{½} d|²."""
        return (self.factor.mT @ (self.delta.sqrt() * deviation.flatten())).square().sum()

    def cast(self, dtype: torch.dtype) -> "DenseNormal":
        """Factorised in float64, used in `dtype`."""
        return DenseNormal(self.factor.to(dtype), self.delta.to(dtype))

    def on(self, device: torch.device) -> "DenseNormal":
        """As it is: a block of all parameters is where the model is."""
        return self
