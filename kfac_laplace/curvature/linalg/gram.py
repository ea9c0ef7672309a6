"""Gram matrices Σ row rowᵀ: sums of products, and rows that are too few to be worth multiplying."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from scipy.linalg import blas
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import product_dtype, sum_dtype
from kfac_laplace.curvature.linalg.packed import mirror_, pack, unpack
from kfac_laplace.curvature.linalg.spectrum import eigenvalues

#: Symmetric products are halved down to so many columns where BLAS has no call for half of one.
WHOLE_COLUMNS = 256
#: So many entries are converted at a time: they stay in the cache until they are multiplied.
CACHED_ENTRIES = 2**18
#: Products in lower precision than that of the sums are of so many rows, or of one call's.
MANY_ROWS = 2**14


@dataclass(frozen=True)
class Gram:
    """Σ row rowᵀ for each of b stacks. Few rows are kept as they are: they need less memory.

    Args:
        packed: sums as by `symmetric.pack`, or (b, 0, 0) while there are none.
        rows: rows that are not in the sums, shape (b, k, i).
    """

    packed: Tensor
    rows: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> "Gram":
        """Symmetric matrices (b, i, i) as they are."""
        b, _, i = matrices.shape
        return cls(pack(matrices), matrices.new_empty(b, 0, i))

    def __add__(self, other: "Gram") -> "Gram":
        """The sum over the rows of both."""
        return Gram(self.packed.clone(), self.rows).absorb(other)

    def absorb(self, other: "Gram") -> "Gram":
        """The same, added into this one's own sums, which nobody else may hold."""
        packed = other.packed
        if self.packed.numel():
            packed = self.packed.add_(packed) if packed.numel() else self.packed
        elif not packed.numel():
            packed = packed.to(torch.promote_types(self.packed.dtype, packed.dtype))
        both = Gram(packed, torch.cat([self.rows, other.rows], 1))
        few = both.rows.shape[1] <= most_rows(both.rows)
        return both if few else both._multiplied()

    def _multiplied(self) -> "Gram":
        """The same without rows."""
        b, k, i = self.rows.shape
        sums = torch.zeros(b, i, i, dtype=self.packed.dtype, device=self.packed.device)
        if k:
            add_products(sums, self.rows)
        packed = pack(sums)
        return Gram(
            packed.add_(self.packed) if self.packed.numel() else packed,
            self.rows.new_empty(b, 0, i),
        )

    def matrices(self) -> Tensor:
        """The Gram matrices (b, i, i)."""
        summed = self.packed.numel() and not self.rows.numel()
        return unpack((self if summed else self._multiplied()).packed)

    def eigenvalues(self, where: str) -> Tensor:
        """Eigenvalues (b, i), ascending, float64; of few rows those of their inner products."""
        k, i = self.rows.shape[1:]
        if self.packed.numel() or k >= i:
            return eigenvalues(self.matrices(), where)
        rows = self.rows.to(self.packed.dtype)
        found = eigenvalues(rows @ rows.mT, where)
        return torch.cat([found.new_zeros(len(found), i - k), found], -1)


def most_rows(rows: Tensor) -> int:
    """Of how many such rows (b, ..., i) packed sums in float64 would need less memory."""
    i = rows.shape[-1]
    return 4 * i // rows.element_size() if i > 1 else 0


class GramSum:
    """Adds rows up to a `Gram`; products are added in place.

    Args:
        b: number of stacks.
        i: width of the rows.
        like: a tensor on the device and in the precision of the rows.
    """

    def __init__(self, b: int, i: int, like: Tensor):
        self._shape = (b, i, i)
        self._device, self._dtype = like.device, sum_dtype(like)
        self._product_dtype = product_dtype(like)
        self._rows: Tensor | None = None  # room for rows as long as they are few
        self._kept = 0  # how many there are
        self._sums: Tensor | None = None  # lower triangles
        self._packed: Tensor | None = None  # sums of products in lower precision
        self._products: Tensor | None = None  # in that precision, not yet in the sums
        self._multiplied = 0  # rows in these products

    @classmethod
    def of(cls, matrices: Tensor) -> "GramSum":
        """A sum that begins with symmetric matrices (b, i, i), which become its own."""
        b, i = matrices.shape[:2]
        total = cls(b, i, matrices)
        total._sums = matrices
        return total

    def __len__(self) -> int:
        """Number of stacks."""
        return self._shape[0]

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows (b', *lead, i) to the stacks from `start` on."""
        if not rows.numel():
            return
        if self._keeps(rows):
            return
        self._multiply_kept()
        self._multiply(rows, start)

    def _keeps(self, rows: Tensor) -> bool:
        """Keep rows if they and those before are few, and no products were made so far."""
        b, *lead, i = rows.shape
        k, room = prod(lead), most_rows(rows)
        if b < len(self) or self._kept + k > room or self._has_products:
            return False
        if self._rows is None:
            # In one piece: many small ones between large temporary ones would scatter the memory.
            self._rows = rows.new_empty(b, room, i)
        if self._rows.dtype != rows.dtype:
            return False
        self._rows[:, self._kept : self._kept + k] = rows.reshape(b, k, i)
        self._kept += k
        return True

    @property
    def _has_products(self) -> bool:
        return any(part is not None for part in (self._sums, self._packed, self._products))

    def _multiply_kept(self) -> None:
        """Turn rows that were kept into products."""
        if self._rows is not None:
            kept, self._rows = self._rows[:, : self._kept], None
            if self._kept:
                self._multiply(kept, 0)
            self._kept = 0

    def _multiply(self, rows: Tensor, start: int) -> None:
        """Add the products of rows."""
        stacks = slice(start, start + len(rows))
        if self._product_dtype == self._dtype:
            add_products(self._lower()[stacks], rows)
            return
        if self._products is None:
            self._products = self._zeros(self._product_dtype)
        add_products(self._products[stacks], rows)
        self._multiplied += rows[0, ..., 0].numel()
        if self._multiplied >= MANY_ROWS:
            self._sum_products()

    def _lower(self) -> Tensor:
        """Sums with valid lower triangles, made if there are none."""
        if self._sums is None:
            self._sums = self._zeros(self._dtype)
        return self._sums

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._shape, dtype=dtype, device=self._device)

    def _sum_products(self) -> None:
        """Add the products to the sums: of many more rows their errors would grow."""
        if self._products is not None:
            packed = pack(self._products).to(self._dtype)
            self._packed = packed if self._packed is None else self._packed.add_(packed)
            self._products, self._multiplied = None, 0

    def gram(self) -> Gram:
        """The sum so far."""
        b, i = self._shape[:2]
        none = torch.empty(b, 0, i, dtype=self._dtype, device=self._device)
        if self._rows is not None:
            return Gram(none[..., :0], self._rows[:, : self._kept].clone())
        self._sum_products()
        return Gram(pack(self._lower()) if self._packed is None else self._packed, none)

    def total(self) -> Tensor:
        """The sum so far as symmetric matrices (b, i, i)."""
        self._multiply_kept()
        self._sum_products()
        if self._packed is not None:
            return unpack(self._packed)
        total = self._lower()
        mirror_(total)
        return total

    def trace(self) -> Tensor:
        """Traces of the sum so far, shape (b,)."""
        if self._rows is not None:
            return self._rows[:, : self._kept].square().sum((1, 2))
        return self.total().diagonal(dim1=-2, dim2=-1).sum(-1)


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add Σ row rowᵀ of rows (b, *lead, i) to the lower triangles of `total` (b, i, i)."""
    if len(rows) > 1:
        flat = rows.to(total.dtype).flatten(1, -2)
        total.baddbmm_(flat.mT, flat)
        return
    # Rows need not lie one after another: one piece or product for each entry of the first axis.
    parts = rows[0].reshape(-1, *rows.shape[-2:]) if rows.ndim > 2 else rows
    if parts.stride(-1) == 1:
        parts = parts.reshape(1, -1, rows.shape[-1])
    if total.device.type != "cpu" or total.dtype not in RANK_K:
        _add_stacks(total[0], parts.to(total.dtype))
        return
    if parts.dtype == total.dtype and parts.is_contiguous():
        pieces: Iterable[Tensor] = [parts]
    elif len(parts) == 1:
        pieces = parts[0].split(max(1, CACHED_ENTRIES // parts.shape[-1]))
    else:
        pieces = parts.split(max(1, CACHED_ENTRIES // parts[0].numel()))
    for piece in pieces:
        _add_rank_k(total[0], piece.to(total.dtype).reshape(-1, parts.shape[-1]))


#: BLAS calls that add a product with its own transpose, half of it: torch has none.
RANK_K = {torch.float32: blas.ssyrk, torch.float64: blas.dsyrk}


def _add_rank_k(total: Tensor, rows: Tensor) -> None:
    """Add Σ row rowᵀ to the lower triangle of `total` (i, i), on the CPU."""
    columns = rows.contiguous().numpy().T
    # In the memory order of Fortran our lower triangle is the upper one.
    RANK_K[total.dtype](1, columns, 1, total.numpy().T, lower=0, overwrite_c=1)


def _add_stacks(total: Tensor, stacks: Tensor) -> None:
    """Add Σ stackᵀ stack of stacks (m, r, i) to the lower triangle of `total` (i, i)."""
    i = stacks.shape[-1]
    if i <= WHOLE_COLUMNS:
        total.addbmm_(stacks.mT, stacks)
        return
    half = i // 2
    left, right = stacks[..., :half], stacks[..., half:]
    total[half:, :half].addbmm_(right.mT, left)
    _add_stacks(total[:half, :half], left)
    _add_stacks(total[half:, half:], right)
