"""Eigenbases of Kronecker factors, and gradients turned into them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import accumulable, in_double

#: Matrices of so few entries are turned together, as calls cost more than the arithmetic: 8 of
#: (16, 17) take 17 in place of 50 µs, of (64, 65) 134 in place of 160, larger ones the same (one
#: core). Their eigenvectors are kept a second time, stacked.
STACKED_ENTRIES = 2**13


@dataclass(frozen=True)
class Side:
    """Eigenvalues and eigenvectors of one side's factors, for b blocks.

    Args:
        values: eigenvalues (b, d), none below zero; in own coordinates the factors' diagonal.
        vectors: eigenvectors as columns (b, d, d), or None: the side stays in its own coordinates.
    """

    values: Tensor
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Bases:
    """Both sides of a group: B = Q_B diag(left.values) Q_Bᵀ (b, o, o), A likewise (b, i, i)."""

    left: Side
    right: Side

    @property
    def own(self) -> bool:
        """Whether both sides stay in their own coordinates."""
        return self.left.vectors is None and self.right.vectors is None


class Eigenbases:
    """The bases of several groups, to turn their matrices all at once.

    Small groups of one shape are turned together; what that needs is kept, so make one of these
    when bases change and use it until they change again.

    Args:
        bases: of each group, in the order of the lists that the methods take.
    """

    def __init__(self, bases: Sequence[Bases]):
        self.bases = tuple(bases)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.bases)

    def enter(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Q_Bᵀ M Q_A for each group's matrices (b, o, i); the same tensor where both are None."""
        turned = list(matrices)
        for stack in self._stacks:
            left = None if stack.left is None else stack.left.mT
            _turn_into(turned, stack.indices, left, stack.right)
        return turned

    def leave(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Q_B M Q_Aᵀ for each group's matrices (b, o, i); the same tensor where both are None."""
        turned = list(matrices)
        for stack in self._stacks:
            right = None if stack.right is None else stack.right.mT
            _turn_into(turned, stack.indices, stack.left, right)
        return turned

    def only(self, indices: Sequence[int]) -> "Eigenbases":
        """Those of some groups: the ones that have gradients in a step."""
        return Eigenbases([self.bases[index] for index in indices])

    @cached_property
    def _stacks(self) -> "list[_Stack]":
        """Groups that are turned together."""
        alike: dict[object, list[int]] = {}
        for index, bases in enumerate(self.bases):
            if not bases.own:
                alike.setdefault(_likeness(bases, index), []).append(index)
        return [
            _Stack(
                indices,
                _joined([self.bases[index].left.vectors for index in indices]),
                _joined([self.bases[index].right.vectors for index in indices]),
            )
            for indices in alike.values()
        ]


@dataclass(frozen=True)
class _Stack:
    """Groups of one shape, and their eigenvectors (b, d, d) with b summed over the groups."""

    indices: list[int]
    left: Tensor | None
    right: Tensor | None


def _likeness(bases: Bases, index: int) -> object:
    """What groups that are turned together have in common; large ones nothing."""
    left, right = bases.left, bases.right
    o, i = left.values.shape[-1], right.values.shape[-1]
    if o * i > STACKED_ENTRIES:
        return index
    kind = (left.values.dtype, left.values.device)
    return (o, i, left.vectors is None, right.vectors is None, *kind)


def _joined(vectors: Sequence[Tensor | None]) -> Tensor | None:
    """Eigenvectors one block after another; all are None or none is."""
    present = [one for one in vectors if one is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)


def _turn_into(
    matrices: list[Tensor], indices: list[int], left: Tensor | None, right: Tensor | None
) -> None:
    """Put left · M · right in the place of some of the matrices."""
    some = [matrices[index] for index in indices]
    joined = some[0] if len(some) == 1 else torch.cat(some)
    if len(joined) == 1:  # a product of matrices costs less than one of stacks of a single one
        turned = joined[0]
        turned = turned if left is None else left[0] @ turned
        turned = (turned if right is None else turned @ right[0]).unsqueeze(0)
    else:
        turned = joined if left is None else left @ joined
        turned = turned if right is None else turned @ right
    parts = [turned] if len(some) == 1 else turned.split([len(one) for one in some])
    for index, part in zip(indices, parts, strict=True):
        matrices[index] = part


def decompose(
    factors: Sequence[Tensor], *, largest: int, dtype: torch.dtype | None = None
) -> list[Side | None]:
    """Eigenvalues and eigenvectors of factors; None for those that have none.

    Factors of one width are decomposed in one call, in their own precision (at least float32) and,
    where that fails or the result is not finite, in float64. Eigenvalues that are negative by
    rounding are zero. A factor has none that is not finite, that fails in float64 too, or that has
    eigenvalues below zero by more than rounding.

    Every basis is a full decomposition. Iterating from the basis before (one product and a QR
    decomposition, as SOAP does) would save little: measured on one core, float32, at widths of 65,
    257, 577 and 1153 it takes 0.09, 1.6, 14 and 116 ms where `eigh` takes 0.14, 2.5, 18 and 127,
    and it is not the eigenbasis.

    Args:
        factors: symmetric positive semi-definite (b, d, d), or their diagonals (b, d).
        largest: wider factors are represented by their diagonals.
        dtype: of the results, or None for that of the factors, at least float32.
    """
    found: list[Side | None] = [None] * len(factors)
    alike: dict[object, list[int]] = {}
    for index, factor in enumerate(factors):
        if factor.ndim == 2 or factor.shape[-1] > largest or factor.shape[-1] == 1:
            found[index] = _own_coordinates(factor, dtype)
        else:
            key = (factor.shape[-1], factor.dtype, factor.device)
            alike.setdefault(key, []).append(index)
    for indices in alike.values():
        some = [factors[index] for index in indices]
        joined = accumulable(some[0] if len(some) == 1 else torch.cat(some))
        sides = _eigh_in_turn(joined, [len(one) for one in some], dtype)
        for index, side in zip(indices, sides, strict=True):
            found[index] = side
    return found


def own_coordinates(like: Tensor) -> Bases:
    """Bases of a group whose factors are not known: no turn, and ones for eigenvalues.

    Args:
        like: matrices (b, o, i) of the group.
    """
    return Bases(Side(torch.ones_like(like[:, :, 0])), Side(torch.ones_like(like[:, 0, :])))


def _own_coordinates(factor: Tensor, dtype: torch.dtype | None) -> Side | None:
    """The diagonal of a factor, which needs no decomposition."""
    values = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
    values = accumulable(values)
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        return None
    return Side(values.to(dtype or values.dtype, copy=True))


def _eigh_in_turn(
    factors: Tensor, sizes: Sequence[int], dtype: torch.dtype | None
) -> list[Side | None]:
    """Sides of factors (Σ b, d, d) that belong to several groups of b blocks each."""
    dtype = dtype or factors.dtype
    groups = factors.split(list(sizes))
    together = _eigh(factors, sizes, dtype)
    found: list[Side | None] = []
    for group, side in zip(groups, together, strict=True):
        if side is None and bool(torch.isfinite(group).all()):
            side = _eigh(in_double(group), [len(group)], dtype)[0]
        found.append(side)
    return found


def _eigh(factors: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> list[Side | None]:
    """The same in the precision of the factors; None for groups that it fails for."""
    # LAPACK and its kin make nonsense of what is not finite, or raise for the whole stack.
    finite = torch.isfinite(factors).flatten(1).all(1)
    if not bool(finite.all()):
        factors = factors.where(finite[:, None, None], torch.eye(factors.shape[-1]).to(factors))
    try:
        values, vectors = torch.linalg.eigh(factors)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in torch's stubs
        return [None] * len(sizes)
    smallest, largest = values[:, 0], values.abs().amax(-1)
    rounding = 10 * factors.shape[-1] * torch.finfo(torch.float32).eps
    values, vectors = values.clamp_min(0).to(dtype), vectors.to(dtype)
    sound = torch.isfinite(values).all(1) & torch.isfinite(vectors).flatten(1).all(1)
    sound = (sound & finite & (smallest >= -rounding * largest)).tolist()
    found: list[Side | None] = []
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        # copies: a view would keep the whole stack alive as long as any of its groups
        side = Side(values[part].clone(), vectors[part].clone())
        found.append(side if all(sound[part]) else None)
        start += size
    return found
