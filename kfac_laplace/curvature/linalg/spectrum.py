"""A block as a rotation and a table of eigenvalues: H = (L ⊗ R) diag(values) (L ⊗ R)ᵀ.

Kronecker blocks have dense bases and values μ λᵀ, diagonal blocks identity bases. `scale · values
+ delta` is the only formula behind the evidence, samples and predictive variances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.basis import (
    Basis,
    columns_turned,
    columns_turned_back,
    turned,
    turned_back,
)
from kfac_laplace.curvature.linalg.log_spectrum import LogSpectrum, log_spectrum
from kfac_laplace.errors import InvalidValue

#: Eigenvectors of B (b, o, o) and of A (b, i, i), as columns; None for a diagonal A.
Rotation = tuple[Basis, Basis | None]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues (b, o, i) of a block and, made when first asked for, its two bases.

    Args:
        values: eigenvalues of the sum over examples at σ = 1, T = 1.
        make_bases: returns left (b, o, o) and right (b, i, i) eigenvectors as columns, the right
            None where that side is diagonal; None where the block is diagonal as it stands.
    """

    values: Tensor
    make_bases: Callable[[], Rotation] | None = None

    @cached_property
    def bases(self) -> Rotation | None:
        """Left and right eigenvectors, or None for identity bases."""
        with torch.inference_mode(False):  # kept, so of use outside inference mode as well
            return self.make_bases() if self.make_bases is not None else None

    @cached_property
    def logs(self) -> LogSpectrum:
        """The eigenvalues' logarithms, few where they are many, for a δ that all of them share."""
        with torch.inference_mode(False):
            return log_spectrum(self.values)

    def log_det_ratio(self, scale: Tensor, delta: Tensor) -> Tensor:
        """log det(scale · H + delta · I) − log det(delta · I), differentiable in both.

        Args:
            scale: likelihood precision 1/(σ²T), shape ().
            delta: prior precision, broadcastable to `values`.
        """
        return (scale * self.values / delta).log1p().sum()

    def effective_dimensions(self, scale: Tensor, delta: Tensor) -> Tensor:
        """Share of each eigendirection that the data determine, shape (b, o, i)."""
        scaled = scale * self.values
        return scaled / (scaled + delta)

    def variances(self, scale: Tensor, delta: Tensor) -> Tensor:
        """Posterior variance 1/(scale · value + delta) of each eigendirection, (b, o, i)."""
        return (scale * self.values + delta).reciprocal()

    def to(self, target: torch.dtype | torch.device) -> "Spectrum":
        """Eigenvalues and, when asked for, bases in another precision or on another device."""
        if target in (self.values.dtype, self.values.device):
            return self
        moved = None if self.make_bases is None else partial(_moved_bases, self, target)
        return Spectrum(self.values.to(target), moved)

    def to_eigenbasis(self, matrices: Tensor) -> Tensor:
        """Lᵀ M R for matrices (..., b, o, i)."""
        if self.bases is None:
            return matrices
        left, right = self.bases
        found = columns_turned(matrices, left)
        return found if right is None else turned(found, right)

    def from_eigenbasis(self, matrices: Tensor) -> Tensor:
        """L M Rᵀ for matrices (..., b, o, i)."""
        if self.bases is None:
            return matrices
        left, right = self.bases
        found = columns_turned_back(matrices, left)
        return found if right is None else turned_back(found, right)


def _moved_bases(spectrum: Spectrum, target: torch.dtype | torch.device) -> Rotation:
    assert spectrum.bases is not None
    left, right = spectrum.bases
    return left.to(target), None if right is None else right.to(target)


def eigenvalues(matrices: Tensor, where: str) -> Tensor:
    """Eigenvalues of symmetric positive semi-definite matrices (b, d, d), ascending, float64."""
    alive = _alive(matrices)
    matrices = _finite(matrices, where)
    _check_dead(matrices, alive, where)
    inner = matrices[:, alive][..., alive]
    found = _non_negative(torch.linalg.eigvalsh(inner), inner, where)
    zeros = found.new_zeros(len(matrices), matrices.shape[-1] - found.shape[-1])
    return torch.cat([zeros, found], -1)


def eigenvalues_of_diagonal(values: Tensor, where: str) -> Tensor:
    """Entries of positive semi-definite diagonals, any shape, float64.

    They are sums of squares, in which no rounding goes below zero.
    """
    values = _finite(values, where)
    if values.numel() and bool(values.min() < 0):
        raise _indefinite(where, f"smallest eigenvalue {float(values.min()):.3e}")
    return values


def eigenbasis(matrices: Tensor, where: str) -> Tensor:
    """Eigenvectors as columns in the order of `eigenvalues`, float64."""
    alive = _alive(matrices)
    matrices = _finite(matrices, where)
    if bool(alive.all()):
        return torch.linalg.eigh(matrices).eigenvectors
    dead, basis = int((~alive).sum()), torch.zeros_like(matrices)
    basis[:, ~alive, :dead] = torch.eye(dead).to(basis)
    inner = torch.linalg.eigh(matrices[:, alive][..., alive]).eigenvectors
    basis[:, alive, dead:] = inner
    return basis


def _alive(matrices: Tensor) -> Tensor:
    """Mask (d,) of the rows that are not zero in all matrices: of units that are always off.

    A zero on the diagonal of a positive semi-definite matrix stands in a row of zeros.
    """
    return (matrices.diagonal(dim1=-2, dim2=-1) != 0).any(0)


def _check_dead(matrices: Tensor, alive: Tensor, where: str) -> None:
    """Refuse other entries in rows with a zero on the diagonal: [[0, x], [x, y]] has det −x².

    Entries within the rounding errors are none: squares underflow before products do.
    """
    if bool(alive.all()):
        return
    beside = matrices[:, ~alive].abs().amax((1, 2))  # (b,)
    largest = matrices.diagonal(dim1=-2, dim2=-1).amax(-1).maximum(beside)
    if bool((beside > _rounding(matrices, largest)).any()):
        raise _indefinite(where, f"{float(beside.max()):.3e} beside a zero on the diagonal")


def _finite(matrices: Tensor, where: str) -> Tensor:
    """In float64; refuse non-finite input, of which LAPACK makes nonsense."""
    if not bool(torch.isfinite(matrices.sum())):
        raise InvalidValue("non-finite curvature", where=where, remedy="Check inputs and weights")
    return matrices.double()


def _non_negative(values: Tensor, matrices: Tensor, where: str) -> Tensor:
    """Zero for negative rounding errors; an error for anything larger."""
    largest = values.abs().amax(-1, keepdim=True) if values.shape[-1] else values
    if bool((values < -_rounding(matrices, largest)).any()):
        raise _indefinite(where, f"smallest eigenvalue {float(values.min()):.3e}")
    return values.clamp_min(0)


def _rounding(matrices: Tensor, largest: Tensor) -> Tensor:
    """What eigenvalues may be off by: some d ε of the largest, shape of `largest`.

    So it is of products in float32, also where they were summed in float64.
    """
    return 10 * matrices.shape[-1] * torch.finfo(torch.float32).eps * largest


def _indefinite(where: str, got: str) -> InvalidValue:
    """The error about curvature that no sum of squares can be."""
    return InvalidValue(
        "curvature is not positive semi-definite",
        where=where,
        got=got,
        remedy="A layer rule or a merged state is wrong",
    )
