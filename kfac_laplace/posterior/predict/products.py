"""J P⁻¹ Jᵀ of a block from gradients in factors, by whichever order of products is cheapest.

Only outputs of one group covary in what is returned: a group is all k outputs of an example where
`width` is k, or one output row where `width` is c.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.basis import Basis, multiplications, turned
from kfac_laplace.curvature.linalg.spectrum import Rotation
from kfac_laplace.curvature.model.budget import Budget, at_once
from kfac_laplace.curvature.rows.per_example import Factored, LookedUp, Outer
from kfac_laplace.posterior.block import BlockNormal, SpectralNormal

#: An entrywise multiplication costs about as much as so many within a matrix product.
ENTRYWISE = 8


def covariance(normal: BlockNormal, gradients: Tensor, width: int) -> Tensor:
    """J P⁻¹ Jᵀ of each example from gradients (v, n, b, o, i), shape (n, v / width, width, width).

    Args:
        normal: the block's posterior.
        gradients: gradients of v outputs.
        width: number of outputs in a group.
    """
    features = normal.features(gradients).movedim(1, 0)  # (n, v, k)
    return _grams(features, width)


def factored_covariance(
    normal: SpectralNormal, gradients: Factored, width: int, budget: Budget
) -> Tensor:
    """The same from factored gradients, which become matrices only where that is cheaper.

    Args:
        normal: the block's posterior.
        gradients: factored gradients of v outputs.
        width: number of outputs in a group.
        budget: how many products exist at a time.
    """
    bases = normal.spectrum.bases
    if isinstance(gradients, LookedUp) and (bases is None or bases[1] is None):
        step = at_once(gradients.left[:, :, 0].numel(), budget.products(gradients.left))
        return torch.cat([_looked_up(normal, piece, width) for piece in gradients.pieces(step)])
    outer = gradients.as_outer()
    if _pairs_are_cheaper(outer, width, bases):
        return by_pairs(normal, outer, width, budget)
    return by_matrices(normal, outer, width, budget)


def _grams(features: Tensor, width: int) -> Tensor:
    """φ φᵀ within groups of features (n, v, k), shape (n, v / width, width, width)."""
    grouped = features.unflatten(1, (-1, width))
    return grouped @ grouped.mT


def _looked_up(normal: SpectralNormal, table: LookedUp, width: int) -> Tensor:
    """From rows of a table, whose right side is diagonal.

    Rows of one entry add up before they are squared: Σ_t Σ_i b̂_cti b̂_c'ti var_i,entry(t).
    """
    left = table.merged()  # (v, n, t, o)
    if normal.spectrum.bases is not None:
        left = _rowwise(left[None], normal.spectrum.bases[0])[0]
    spread = normal.deviations[0].mT[table.index]  # (n, t, o)
    return _grams((left * spread).movedim(1, 0).flatten(2), width)


def _pairs_are_cheaper(gradients: Outer, width: int, bases: Rotation | None) -> bool:
    """Whether pairs of shared positions cost less than matrices, by multiplications."""
    v, _, _, t, o = gradients.left.shape
    i = gradients.right.shape[-1]
    matrices = v * t * o * i + v * width * o * i + ENTRYWISE * v * o * i
    pairs = t * t * o * i + v * width * t * o + ENTRYWISE * t * t * (v * o + i)
    if bases is not None:
        left, right = (0 if basis is None else multiplications(basis) for basis in bases)
        matrices += v * min(t, i) * left + min(t, v * o) * right
        pairs += v * t * left + t * right
    return pairs <= matrices


def by_pairs(normal: SpectralNormal, gradients: Outer, width: int, budget: Budget) -> Tensor:
    """From the two sides and pairs of positions, without a matrix of any example.

    With rotated rows b̂, â: Σ_ts Σ_i b̂_cti b̂_c'si m_tsi, where m_tsi = Σ_j â_tj â_sj var_ij. One row
    an example costs O(o i + v² o).
    """
    v, b, _, t, o = gradients.left.shape
    i = gradients.right.shape[-1]
    step = at_once(b * t * (i + o + 2 * v * o), budget.products(gradients.left))
    variances = normal.deviations.square().mT  # (b, i, o)
    found = []
    for piece in gradients.pieces(step):
        left, right = _rotated_left(normal, piece.left), _rotated_right(normal, piece.right)
        if t == 1:
            spread = _rowwise(right.square(), variances).sqrt()  # (b, n, 1, o)
            found.append(_grams(_by_example(left * spread), width))
            continue
        other = torch.zeros_like(left)
        for position in range(t):  # its pairs with every s
            pairs = right[:, :, position, None] * right  # (b, n, s, i)
            other += left[..., position, None, :] * _rowwise(pairs, variances)
        grouped = (_by_example(x).unflatten(1, (-1, width)) for x in (left, other))
        product = next(grouped) @ next(grouped).mT  # (n, v / width, width, width)
        found.append((product + product.mT) / 2)
    return torch.cat(found)


def _by_example(rows: Tensor) -> Tensor:
    """Rows (v, b, n, t, o) as features (n, v, b t o)."""
    return rows.permute(2, 0, 1, 3, 4).flatten(2)


def by_matrices(normal: SpectralNormal, gradients: Outer, width: int, budget: Budget) -> Tensor:
    """From matrices (o, i), each side rotated before or after the product over positions."""
    v, b, n, t, o = gradients.left.shape
    i, limit = gradients.right.shape[-1], budget.products(gradients.left)
    rows_at_once = min(o, at_once(v * b * i, limit))
    left_first = t < i or rows_at_once < o  # the rows of a rotated matrix need all of its rows
    right_first = t < v * o
    found = gradients.left.new_zeros(n, v // width, width, width)
    step = at_once(b * max(v * o * min(t, i), t * i, v * rows_at_once * i), limit)
    for start, piece in zip(range(0, n, step), gradients.pieces(step), strict=True):
        left = _rotated_left(normal, piece.left) if left_first else piece.left
        right = _rotated_right(normal, piece.right) if right_first else piece.right
        left = left.permute(1, 2, 0, 4, 3)  # (b, n, v, o, t)
        total = found[start : start + step]
        for rows in _slices(o, rows_at_once):
            own = left[..., rows, :]
            matrices = (own.flatten(2, 3) @ right).unflatten(2, own.shape[2:4])  # (b, n, v, o, i)
            if not right_first:
                matrices = _rotated_right(normal, matrices)
            if not left_first:
                matrices = _rotated_columns(normal, matrices)
            matrices *= normal.deviations[:, None, None, rows]
            total += _grams(matrices.movedim(0, 2).flatten(2), width)
    return found


def _slices(size: int, step: int) -> Iterator[slice]:
    """Slices of `step` that cover `size`."""
    return (slice(start, start + step) for start in range(0, size, step))


def _rotated_left(normal: SpectralNormal, left: Tensor) -> Tensor:
    """Gradient rows (v, b, n, t, o) in the eigenbasis."""
    bases = normal.spectrum.bases
    return left if bases is None else _rowwise(left.movedim(1, 0), bases[0]).movedim(0, 1)


def _rotated_right(normal: SpectralNormal, right: Tensor) -> Tensor:
    """Input rows (b, ..., i), or rows of matrices, in the eigenbasis."""
    bases = normal.spectrum.bases
    return right if bases is None or bases[1] is None else _rowwise(right, bases[1])


def _rotated_columns(normal: SpectralNormal, matrices: Tensor) -> Tensor:
    """Columns of matrices (b, n, v, o, i) in the eigenbasis."""
    bases = normal.spectrum.bases
    if bases is None:
        return matrices
    if isinstance(bases[0], Tensor):
        return bases[0].mT[:, None, None] @ matrices
    return _rowwise(matrices.mT, bases[0]).mT


def _rowwise(rows: Tensor, matrices: Basis) -> Tensor:
    """Rows (b, ..., d) times matrices (b, d, e), one product for each b and no copies of it."""
    return turned(rows.flatten(1, -2), matrices).unflatten(1, rows.shape[1:-1])
