"""Per-example gradients in factored form, of which all else is a reduction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kfac_laplace.curvature.model.budget import Budget, at_once


class Factored(Protocol):
    """Per-example gradients of b matrices (o, i), as a sum over t of outer products."""

    @property
    def left(self) -> Tensor:
        """Gradient rows (v, b, n, t, o)."""

    def dense(self) -> Tensor:
        """The gradients as matrices, shape (v, n, b, o, i)."""

    def pieces(self, step: int) -> "Iterator[Factored]":
        """The same for at most `step` examples at a time."""

    def squares(self, budget: Budget) -> Tensor:
        """Σ_v Σ_n of the squared gradients, shape (b, o, i).

        Args:
            budget: how many gradients exist as matrices at a time, where any do.
        """

    def as_outer(self) -> "Outer":
        """Both sides as tensors."""

    def turned(self, left: Tensor, right: Tensor | None) -> "Factored":
        """The gradients Uᵀ G W in bases U (b, o, o) and W (b, i, i); None for the identity."""


@dataclass(frozen=True)
class Outer:
    """Per-example gradients Σ_t left[v, b, n, t] right[b, n, t]ᵀ of a group.

    Args:
        left: gradient rows (v, b, n, t, o).
        right: input rows (b, n, t, i).
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The gradients as matrices, shape (v, n, b, o, i)."""
        if self.left.shape[-1] == self.right.shape[-1] == 1:  # a product of scalars for each row
            return (self.left * self.right).sum(3).movedim(1, 2)[..., None]
        return torch.einsum("vbnto,bnti->vnboi", self.left, self.right)

    def pieces(self, step: int) -> "Iterator[Outer]":
        """The same for at most `step` examples at a time."""
        for left, right in zip(self.left.split(step, 2), self.right.split(step, 1), strict=True):
            yield Outer(left, right)

    def squares(self, budget: Budget) -> Tensor:
        """Σ_v Σ_n of the squared gradients; one row an example is squared side by side."""
        if self.right.shape[2] == 1:
            left, right = self.left[..., 0, :].square(), self.right[..., 0, :].square()
            return torch.einsum("vbno,bni->boi", left, right)
        entries = self.left[:, :, 0, 0].numel() * self.right.shape[-1]
        step = at_once(entries, budget.gradients(self.left))
        total: Tensor | None = None
        for piece in self.pieces(step):
            part = piece.dense().square_().sum((0, 1))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def as_outer(self) -> "Outer":
        """Itself."""
        return self

    def turned(self, left: Tensor, right: Tensor | None) -> "Outer":
        """Both sides turned."""
        rows = torch.einsum("vbnto,bop->vbntp", self.left, left)
        return Outer(
            rows, self.right if right is None else torch.einsum("bnti,bij->bntj", self.right, right)
        )

    def entries(self, places: Tensor) -> Tensor:
        """Some entries of the gradients, shape (v, n, k), without the matrices.

        Args:
            places: where they stand in matrices (b, o, i) once these are flattened, (k,).
        """
        o, i = self.left.shape[-1], self.right.shape[-1]
        rows, columns = places // i, places // (o * i) * i + places % i  # of (b o) and (b i)
        left = self.left.permute(0, 2, 3, 1, 4).flatten(3)[..., rows]  # (v, n, t, k)
        right = self.right.permute(1, 2, 0, 3).flatten(2)[..., columns]  # (n, t, k)
        return (left * right).sum(2)


@dataclass(frozen=True)
class LookedUp:
    """Per-example gradients of a table: gradient rows go to the entries that were looked up.

    Args:
        left: gradient rows (v, 1, n, t, o), zero where a row does not count.
        index: the entry of each row, shape (n, t).
        size: number of entries i.
    """

    left: Tensor
    index: Tensor
    size: int

    def dense(self) -> Tensor:
        """The gradients as matrices, shape (v, n, 1, o, i)."""
        v, _, n, t, o = self.left.shape
        out = self.left.new_zeros(v, n, self.size, o)
        index = self.index[None, :, :, None].expand(v, n, t, o)
        return out.scatter_add_(2, index, self.left[:, 0]).mT[:, :, None]

    def pieces(self, step: int) -> "Iterator[LookedUp]":
        """The same for at most `step` examples at a time."""
        for left, index in zip(self.left.split(step, 2), self.index.split(step), strict=True):
            yield LookedUp(left, index, self.size)

    def merged(self) -> Tensor:
        """Rows that look up one entry summed into the first of them, shape (v, n, t, o)."""
        same = self.index[:, :, None] == self.index[:, None, :]  # (n, t, t)
        first = same.to(torch.uint8).argmax(-1)  # of equal entries, the first wins
        v, _, n, t, o = self.left.shape
        out = torch.zeros_like(self.left[:, 0])
        return out.scatter_add_(2, first[None, :, :, None].expand(v, n, t, o), self.left[:, 0])

    def squares(self, budget: Budget) -> Tensor:
        """Σ_v Σ_n of the squared gradients, shape (1, o, i): no matrix of any example."""
        squared = self.merged().square().sum(0).flatten(0, 1)  # (n t, o)
        out = squared.new_zeros(self.size, squared.shape[-1])
        return out.index_add_(0, self.index.flatten(), squared).mT[None]

    def turned(self, left: Tensor, right: Tensor | None) -> Factored:
        """The gradient rows turned: a table's own basis is the identity."""
        if right is not None:
            return self.as_outer().turned(left, right)
        return LookedUp(self.left @ left[0], self.index, self.size)

    def as_outer(self) -> Outer:
        """With one-hot rows in full."""
        one_hot = torch.nn.functional.one_hot(self.index, self.size).to(self.left.dtype)
        return Outer(self.left, one_hot[None])


def joined(parts: Sequence[tuple[int, Factored]], blocks: int) -> Factored:
    """The uses of one group together: more shared positions, each use at its own blocks.

    Args:
        parts: the first block of each use, and its gradients.
        blocks: number of blocks b of the group.
    """
    if len(parts) == 1 and parts[0][1].left.shape[1] == blocks:
        return parts[0][1]
    if all(isinstance(outer, LookedUp) for _, outer in parts) and blocks == 1:
        tables = [outer for _, outer in parts if isinstance(outer, LookedUp)]
        left = torch.cat([table.left for table in tables], 3)
        return LookedUp(left, torch.cat([table.index for table in tables], 1), tables[0].size)
    by_start: dict[int, list[Outer]] = {}
    for start, outer in parts:
        by_start.setdefault(start, []).append(outer.as_outer())
    lefts = {s: torch.cat([outer.left for outer in found], 3) for s, found in by_start.items()}
    rights = {s: torch.cat([outer.right for outer in found], 2) for s, found in by_start.items()}
    return Outer(_placed(lefts, blocks, 1), _placed(rights, blocks, 0))


def _placed(parts: dict[int, Tensor], blocks: int, axis: int) -> Tensor:
    """Put rows (..., b, n, t, d) at their blocks along `axis`; zero elsewhere."""
    some = next(iter(parts.values()))
    if len(parts) == 1 and some.shape[axis] == blocks:
        return some
    shape = list(some.shape)
    shape[axis], shape[axis + 2] = blocks, max(part.shape[axis + 2] for part in parts.values())
    out = some.new_zeros(shape)
    for start, part in parts.items():
        out.narrow(axis, start, part.shape[axis]).narrow(axis + 2, 0, part.shape[axis + 2]).copy_(
            part
        )
    return out
