"""The leading directions of Σ row rowᵀ, of few rows beside many columns."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfac_laplace.curvature.model.tensors import has_values
from kfac_laplace.errors import InvalidValue

#: Entries that are converted to another precision at a time.
CONVERTED = 2**22


def leading(
    parts: Sequence[Tensor], count: int, dtype: torch.dtype, where: str = "lowrank"
) -> tuple[Tensor, Tensor]:
    """The rows U_cᵀ R for the `count` largest eigenvalues of R Rᵀ = U Λ Uᵀ, and the others' sum.

    Rᵀ U U_ᵀ R over these is the best approximation of RᵀR of such a rank, and never above it. Its
    error is positive semi-definite, with that sum as its trace.

    Args:
        parts: R in pieces (m, p), one above the other.
        count: how many directions to keep.
        dtype: the precision of products and of the eigenvectors.
        where: what is to be named where rows are not finite.

    Returns:
        Rows (count, p), orthogonal to each other, in the precision of R, and the trace of the
        rest, shape (). Rows that are no more than `count` come as they are.

    Raises:
        InvalidValue: rows that are not finite.
    """
    kept = parts[0].dtype
    for part in parts[1:]:
        kept = torch.promote_types(kept, part.dtype)
    m, p = sum(map(len, parts)), parts[0].shape[1]
    none = parts[0].new_zeros((), dtype=dtype)
    if m <= count:
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts))), none
    gram = parts[0].new_zeros(m, m, dtype=dtype)
    for columns in _columns(m, p):
        rows = _converted(parts, columns, dtype)
        gram.addmm_(rows, rows.mT)
    if has_values(gram) and not bool(torch.isfinite(gram.sum())):
        raise InvalidValue(
            "non-finite curvature",
            where=where,
            remedy="Check inputs and weights; half precision may overflow",
        )
    values, vectors = torch.linalg.eigh(gram)  # ascending
    turned, found = vectors[:, m - count :].mT, parts[0].new_empty(count, p, dtype=kept)
    for columns in _columns(m, p):
        rows = _converted(parts, columns, dtype)
        found[:, columns] = (turned @ rows).to(kept)
    # A sum of what is zero but for rounding may come out below it.
    return found, values[: m - count].sum().clamp_min(0)


def inner(vectors: Tensor, rows: Tensor) -> Tensor:
    """Inner products (m, k) of vectors (m, p) with rows (k, p), in the vectors' precision."""
    if rows.dtype == vectors.dtype:
        return vectors @ rows.mT
    found = vectors.new_zeros(len(vectors), len(rows))
    for columns in _columns(len(rows), rows.shape[1]):
        found = found + vectors[:, columns] @ rows[:, columns].to(vectors.dtype).mT
    return found


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """Sums (m, p) of rows (k, p) by weights (m, k), in the weights' precision."""
    if rows.dtype == weights.dtype:
        return weights @ rows
    pieces = _columns(len(rows), rows.shape[1])
    return torch.cat([weights @ rows[:, columns].to(weights.dtype) for columns in pieces], 1)


def _converted(parts: Sequence[Tensor], columns: slice, dtype: torch.dtype) -> Tensor:
    """Some columns of rows in pieces, together and in another precision, without a copy between."""
    width = len(range(*columns.indices(parts[0].shape[1])))
    rows = parts[0].new_empty(sum(map(len, parts)), width, dtype=dtype)
    start = 0
    for part in parts:
        rows[start : start + len(part)] = part[:, columns]
        start += len(part)
    return rows


def _columns(m: int, p: int) -> Iterator[slice]:
    """Columns of m rows of p, few enough at a time."""
    step = max(1, CONVERTED // max(1, m))
    return (slice(start, start + step) for start in range(0, p, step))
