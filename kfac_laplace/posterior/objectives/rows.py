"""Derivatives of output columns by parameters, and their inner products group by group.

A row is Jᵀv of one example for one vector v. Of a layer with one position an example it is an outer
product, and inner products of rows are products of those of its two sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.by_group import (
    copied_gradients,
    factored_gradient,
    gradient_pieces,
)
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import in_double, without_autocast
from kfac_laplace.curvature.rows.per_example import Factored, LookedUp


class Rows(Protocol):
    """m rows of a group's derivatives, matrices (b, o, i) each."""

    def times(self, other: "Rows") -> Tensor:
        """Inner products with the rows of another of the same kind, float64 (m, m')."""

    def dense(self) -> Tensor:
        """The rows as they are, (m, b o i)."""

    def joined(self, others: Sequence["Rows"]) -> "Rows":
        """These rows and others of the same kind."""


@dataclass(frozen=True)
class Flat:
    """Rows as they are.

    Args:
        rows: shape (m, p).
    """

    rows: Tensor

    def times(self, other: Rows) -> Tensor:
        """A matrix product."""
        x = in_double(self.rows)
        return x @ (x if other is self else in_double(other.dense())).mT

    def dense(self) -> Tensor:
        """Themselves."""
        return self.rows

    def joined(self, others: Sequence[Rows]) -> "Flat":
        """One behind the other."""
        return Flat(torch.cat([self.rows, *(each.dense() for each in others)]))


@dataclass(frozen=True)
class Product:
    """Outer products of b pairs.

    Args:
        left: shape (m, b, o).
        right: shape (m, b, i).
    """

    left: Tensor
    right: Tensor

    def times(self, other: Rows) -> Tensor:
        """Σ_b (l · l')(r · r')."""
        assert isinstance(other, Product)
        sides = []
        for x, y in ((self.left, other.left), (self.right, other.right)):
            x64 = in_double(x).movedim(1, 0)
            sides.append(x64 @ (x64 if y is x else in_double(y).movedim(1, 0)).mT)  # (b, m, m')
        return (sides[0].mul_(sides[1])).sum(0)

    def dense(self) -> Tensor:
        """Products of all entries."""
        return (self.left[..., None] * self.right[..., None, :]).flatten(1)

    def joined(self, others: Sequence[Rows]) -> "Product":
        """Both sides one behind the other."""
        every = [self, *(each for each in others if isinstance(each, Product))]
        return Product(torch.cat([e.left for e in every]), torch.cat([e.right for e in every]))


@dataclass(frozen=True)
class Table:
    """Rows of a table of which few entries are looked up.

    Args:
        left: gradient rows (m, t, o).
        index: entry of each, (m, t).
        size: number of entries.
    """

    left: Tensor
    index: Tensor
    size: int

    def times(self, other: Rows) -> Tensor:
        """By the entries that are looked up at all."""
        assert isinstance(other, Table)
        entries, place = torch.unique(
            torch.cat([self.index.flatten(), other.index.flatten()]), return_inverse=True
        )
        mine, theirs = place.split([self.index.numel(), other.index.numel()])
        x = self._over(mine, len(entries))
        return x @ (x if other is self else other._over(theirs, len(entries))).mT

    def dense(self) -> Tensor:
        """In matrices (1, o, size)."""
        spread = self._over(self.index.flatten(), self.size, self.left.dtype)
        return spread.unflatten(1, (self.size, -1)).mT.flatten(1)

    def joined(self, others: Sequence[Rows]) -> "Table":
        """Padded to as many positions."""
        every = [self, *(each for each in others if isinstance(each, Table))]
        t = max(each.index.shape[1] for each in every)
        pad = torch.nn.functional.pad
        left = [pad(each.left, (0, 0, 0, t - each.left.shape[1])) for each in every]
        index = [pad(each.index, (0, t - each.index.shape[1])) for each in every]
        return Table(torch.cat(left), torch.cat(index), self.size)

    def _over(self, place: Tensor, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Rows (m, size o) by places of the looked-up entries."""
        m, t, o = self.left.shape
        out = self.left.new_zeros(m, size, o, dtype=dtype)
        index = place.reshape(m, t, 1).expand(m, t, o)
        return out.scatter_add_(1, index, self.left.to(dtype)).flatten(1)


def inner_products(one: Rows, other: Rows) -> Tensor:
    """Inner products (m, m') of the rows of a group, float64, of whatever kinds they are."""
    if type(one) is type(other):
        return one.times(other)
    return Flat(one.dense()).times(Flat(other.dense()))


def stacked(parts: Sequence[tuple[int, Mapping[str, Rows]]]) -> dict[str, Rows]:
    """Rows of several vectors and batches, one behind the other.

    Args:
        parts: number of rows of each part, and its rows by group, where it has any.
    """
    names = dict.fromkeys(name for _, own in parts for name in own)
    found: dict[str, Rows] = {}
    for name in names:
        every = [own.get(name) for _, own in parts]
        kinds = {type(each) for each in every}
        if len(kinds) == 1 and every[0] is not None:
            found[name] = every[0].joined([each for each in every[1:] if each is not None])
            continue
        dense = [None if each is None else each.dense() for each in every]
        some = next(each for each in dense if each is not None)
        found[name] = Flat(
            torch.cat(
                [
                    some.new_zeros(m, some.shape[1]) if each is None else each
                    for (m, _), each in zip(parts, dense, strict=True)
                ]
            )
        )
    return found


def rows_of(
    passed: ForwardPass, groups: Sequence[Group], vectors: Sequence[Tensor]
) -> list[tuple[int, Mapping[str, Rows]]]:
    """For each vector how many rows it has, and they group by group; zeros are left out.

    Examples for which a vector is zero have no row.

    Args:
        passed: a pass whose row layouts are known.
        groups: the groups wanted.
        vectors: v backward vectors (n, t, c).
    """
    found = []
    for vector in vectors:
        kept = (vector != 0).flatten(1).any(1)
        known = passed.rows([vector], groups)
        copied = copied_gradients(passed, [vector])
        with without_autocast(vector.device):
            own: dict[str, Rows] = {}
            for group in groups:
                factored = None
                if group.factored and group.name not in passed.without_rules:
                    factored = factored_gradient(passed, group, known)
                rows = None if factored is None else _factored(factored, kept)
                if rows is None:
                    pieces = [*gradient_pieces(passed, group, known, copied)]
                    if not pieces:
                        continue
                    rows = Flat(torch.cat(pieces, 1)[0].flatten(1)[kept])
                own[group.name] = rows
        found.append((int(kept.sum()), own))
    return found


def _factored(gradients: Factored, kept: Tensor) -> Rows | None:
    """Rows in factors, where these are smaller than matrices; None elsewhere."""
    if isinstance(gradients, LookedUp):
        return Table(gradients.left[0, 0][kept], gradients.index[kept], gradients.size)
    outer = gradients.as_outer()
    _, b, _, t, o = outer.left.shape
    i = outer.right.shape[-1]
    if t > 1 or o * i <= 2 * (o + i):
        return None
    left, right = outer.left[0, :, :, 0].movedim(0, 1), outer.right[:, :, 0].movedim(0, 1)
    return Product(left[kept], right[kept])
