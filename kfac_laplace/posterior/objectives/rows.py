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
    block_gradients,
    copied_gradients,
    factored_gradient,
)
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import in_double, without_autocast
from kfac_laplace.curvature.linalg.gram import add_products
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.rows.inputs import WithOne
from kfac_laplace.curvature.rows.per_example import LookedUp
from kfac_laplace.curvature.rows.row_layout import Axis

#: Entries that are converted to float64 at a time.
CONVERTED = 2**22


class Rows(Protocol):
    """m rows of a group's derivatives, matrices (b, o, i) each."""

    def times(self, other: "Rows") -> Tensor:
        """Inner products with the rows of another of the same kind, float64 (m, m')."""

    @property
    def entries(self) -> int:
        """How many numbers are held."""

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
        """A matrix product in float64, some columns at a time."""
        x, y = self.rows, other.dense()
        total = in_double(x.new_empty(0)).new_zeros(len(x), len(y))
        if other is self:
            add_products(total[None], x.mT[None])  # its lower triangle
            return total.tril() + total.tril(-1).mT
        step = at_once(len(x) + len(y), CONVERTED)
        for own, theirs in zip(x.split(step, 1), y.split(step, 1), strict=True):
            total.addmm_(in_double(own), in_double(theirs).mT)
        return total

    @property
    def entries(self) -> int:
        """All."""
        return self.rows.numel()

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

    @property
    def entries(self) -> int:
        """Both sides."""
        return self.left.numel() + self.right.numel()

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

    @property
    def entries(self) -> int:
        """The gradient rows."""
        return self.left.numel()

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


#: A number of rows, and they by group: a vector's.
Part = tuple[int, dict[str, Rows]]


def inner_products(one: Rows, other: Rows) -> Tensor:
    """Inner products (m, m') of the rows of a group, float64, of whatever kinds they are."""
    if type(one) is type(other):
        return one.times(other)
    return Flat(one.dense()).times(Flat(other.dense()))


def stacked(parts: Sequence[Part]) -> dict[str, Rows]:
    """Rows of several vectors and batches, one behind the other.

    Args:
        parts: number of rows of each part, and its rows by group, where it has any. The parts are
            taken out of their mappings, so that no group is held twice.
    """
    names = dict.fromkeys(name for _, own in parts for name in own)
    found: dict[str, Rows] = {}
    for name in names:
        every = [own.pop(name, None) for _, own in parts]
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


def rows_of(passed: ForwardPass, groups: Sequence[Group], vectors: Sequence[Tensor]) -> list[Part]:
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
        if not bool(kept.any()):
            continue
        known = passed.rows([vector], groups)
        copied = copied_gradients(passed, [vector])
        with without_autocast(vector.device):
            own = {group.name: _rows(passed, group, known, copied, kept) for group in groups}
        found.append((int(kept.sum()), {n: rows for n, rows in own.items() if rows is not None}))
    return found


def _rows(
    passed: ForwardPass,
    group: Group,
    known: Mapping[int, Tensor],
    copied: Mapping[str, Tensor],
    kept: Tensor,
) -> Rows | None:
    """Rows of those examples that a mask keeps; None where the outputs do not depend on them."""
    if group.factored and group.part is None and group.name not in passed.without_rules:
        if group.diagonal:
            table = factored_gradient(passed, group, known)
            if isinstance(table, LookedUp):
                left, index = _kept(table.left[0, 0], kept), _kept(table.index, kept)
                return Table(left, index, table.size)
        else:
            rows = _of_one_use(passed, group, known, kept)
            if rows is not None:
                return rows
    whole = block_gradients(passed, group, known, copied)
    return None if whole is None else Flat(_kept(whole[0].flatten(1), kept))


def _of_one_use(
    passed: ForwardPass, group: Group, known: Mapping[int, Tensor], kept: Tensor
) -> Rows | None:
    """Rows of a layer that is used once; None for any other."""
    terms = [term for term in passed.terms[group.name] if term.use in known]
    if len(terms) != 1:
        return None
    (term,) = terms
    layout, n = passed.row_layout(term.use), passed.n
    left = layout.by_example(group.own_rows(known[term.use]), n, block_axis=1)  # (1, b, n, t, o)
    b, o, i = group.layout.matrix
    if left.shape[1] != b:
        return None
    if left.shape[3] == 1 and o * i > 2 * (o + i):
        right = term.inputs.gradients(left, layout, n).as_outer().right
        sides = left[0, :, :, 0].movedim(0, 1), right[:, :, 0].movedim(0, 1)
        return Product(*(_kept(side, kept) for side in sides))
    inputs, joint = term.inputs, isinstance(term.inputs, WithOne)
    if isinstance(inputs, WithOne):  # the bias's column is a sum: no copy of all rows for it
        inputs = inputs.inner
    step = at_once(left.shape[3] * i, CONVERTED // 4)
    whole = isinstance(layout, Axis) and layout.axis == 0 and inputs.lead[0] == n
    parts = inputs.split(step) if whole else None
    if parts is None:
        parts, step = iter([inputs]), n
    out = left.new_empty(n, b, o, i)
    for k, (part, rows) in enumerate(zip(parts, left.split(step, 2), strict=True)):
        own = out[k * step : k * step + rows.shape[2]]
        own[..., : i - joint] = part.gradients(rows, layout, len(own)).dense()[0]
        if joint:
            own[..., -1] = rows[0].sum(2).movedim(0, 1)
    return Flat(_kept(out.flatten(1), kept))


def _kept(rows: Tensor, kept: Tensor) -> Tensor:
    return rows if bool(kept.all()) else rows[kept]
