"""log det(I + Σ_l w_l K_l) with its derivatives in w, in whichever of three forms is small.

K_l = J_l J_lᵀ over the rows J of the data's output columns, restricted to the entries that share
precision l. With w_l = s/δ_l this is log det P − log det P₀, and w_l ∂/∂w_l of it is γ_l.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue


class LogDet(Protocol):
    """log det(I + Σ_l w_l K_l) for float64 weights w (length of the prior,)."""

    @property
    def traces(self) -> Tensor:
        """tr K_l, shape (length of the prior,)."""

    def value(self, weights: Tensor) -> Tensor:
        """The log-determinant, shape ()."""

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The log-determinant, and its derivatives in the weights."""


@dataclass(frozen=True)
class Grams:
    """One Gram matrix for each precision: for few precisions.

    Args:
        matrices: K_l of those precisions that have any curvature, float64 (k, m, m).
        places: their places in the vector of precisions, (k,).
        length: length of that vector.
    """

    matrices: Tensor
    places: Tensor
    length: int

    @property
    def traces(self) -> Tensor:
        """tr K_l."""
        return self._spread(self.matrices.diagonal(dim1=1, dim2=2).sum(-1))

    def value(self, weights: Tensor) -> Tensor:
        """By a Cholesky factor."""
        return _log_det(self.factor(weights))

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """∂/∂w_l = tr[(I + Σ w K)⁻¹ K_l]."""
        factor = self.factor(weights)
        inverse = torch.cholesky_inverse(factor)
        return _log_det(factor), self._spread(self.matrices.flatten(1) @ inverse.flatten())

    def factor(self, weights: Tensor) -> Tensor:
        """Lower Cholesky factor (m, m) of I + Σ w K, differentiable in the weights."""
        k, m, _ = self.matrices.shape
        total = (weights[self.places] @ self.matrices.reshape(k, m * m)).reshape(m, m)
        return _cholesky(total)

    def _spread(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.length).index_add(0, self.places, values)


@dataclass(frozen=True)
class Primal:
    """The GGN of all parameters: for few of them, whatever the number of rows and precisions.

    Args:
        matrix: JᵀJ, float64 (p, p).
        index: the precision of each entry, (p,).
        length: number of precisions.
    """

    matrix: Tensor
    index: Tensor
    length: int

    @property
    def traces(self) -> Tensor:
        """tr K_l."""
        return self._sums(self.matrix.diagonal())

    def value(self, weights: Tensor) -> Tensor:
        """By a Cholesky factor."""
        return _log_det(self._factor(weights))

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """∂/∂w_l = Σ_i (1 − [(I + W^½ H W^½)⁻¹]_ii)/w_l."""
        factor = self._factor(weights)
        gamma = 1 - torch.cholesky_inverse(factor).diagonal()
        return _log_det(factor), self._sums(gamma) / weights

    def _factor(self, weights: Tensor) -> Tensor:
        root = weights.sqrt()[self.index]
        return _cholesky(root[:, None] * self.matrix * root)

    def _sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.length).index_add(0, self.index, values)


@dataclass(frozen=True)
class Wide:
    """The rows as they are: for many precisions.

    Args:
        rows: J, float64 (m, p).
        index: the precision of each column, (p,).
        length: number of precisions.
    """

    rows: Tensor
    index: Tensor
    length: int

    @property
    def traces(self) -> Tensor:
        """tr K_l."""
        return self._sums(self.rows.square().sum(0))

    def value(self, weights: Tensor) -> Tensor:
        """By a Cholesky factor."""
        return _log_det(self.factor(weights))

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """∂/∂w_l = Σ_k ‖L⁻¹ J_k‖² over the columns k of precision l."""
        factor = self.factor(weights)
        solved = torch.linalg.solve_triangular(factor, self.rows, upper=False)
        return _log_det(factor), self._sums(solved.square().sum(0))

    def factor(self, weights: Tensor) -> Tensor:
        """Lower Cholesky factor (m, m) of I + Σ w K, differentiable in the weights."""
        scaled = self.rows * weights.sqrt()[self.index]
        return _cholesky(scaled @ scaled.mT)

    def _sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.length).index_add(0, self.index, values)


@dataclass(frozen=True)
class Sum:
    """Σ_j a_j log det(I + c_j Σ_l w_l K_l) over several sets of rows.

    Args:
        terms: a, c and the log-determinant of each.
    """

    terms: Sequence[tuple[float, float, LogDet]]

    @property
    def traces(self) -> Tensor:
        """Σ_j a_j c_j tr K_l."""
        return torch.stack([a * c * part.traces for a, c, part in self.terms]).sum(0)

    def value(self, weights: Tensor) -> Tensor:
        """The sum."""
        return torch.stack([a * part.value(c * weights) for a, c, part in self.terms]).sum()

    def slopes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum and its derivatives."""
        found = [(a, c, *part.slopes(c * weights)) for a, c, part in self.terms]
        value = torch.stack([a * value for a, _, value, _ in found]).sum()
        return value, torch.stack([a * c * slope for a, c, _, slope in found]).sum(0)


def log_det(part: LogDet, weights: Tensor) -> Tensor:
    """The log-determinant, shape (), differentiable (once) in the weights.

    Args:
        part: whose.
        weights: w = s/δ, float64 (length of the prior,).
    """
    found: Tensor = _Differentiable.apply(part, weights)  # type: ignore[no-untyped-call]
    return found


class _Differentiable(torch.autograd.Function):
    # Through γ: autograd would go back through the Cholesky factor, at several times the cost.

    @staticmethod
    def forward(ctx: Any, part: LogDet, weights: Tensor) -> Tensor:
        if not weights.requires_grad:
            return part.value(weights)
        value, slopes = part.slopes(weights.detach())
        ctx.save_for_backward(slopes)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (slopes,) = ctx.saved_tensors
        return None, grad * slopes


def _log_det(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal().log().sum()


def _cholesky(matrix: Tensor) -> Tensor:
    """The factor of I + a fresh matrix, in whose place it is made."""
    matrix.diagonal().add_(1)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise InvalidValue(
            "I + Σ K/δ is not positive definite in float64",
            where="objective",
            remedy="Keep prior precisions further from zero",
        )
    return factor
