"""Gram matrices Σ row rowᵀ: sums of products, and rows that are too few to be worth multiplying."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import scipy  # loads its parts when they are used
import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.basis import Basis
from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable
from kfac_laplace.curvature.linalg.operations import note
from kfac_laplace.curvature.linalg.packed import diagonals, pack, packed_zeros, unpack
from kfac_laplace.curvature.linalg.spectrum import eigenbasis, eigenvalues
from kfac_laplace.curvature.model.tensors import has_values
from kfac_laplace.errors import UnsupportedUse

#: Symmetric products are halved down to so many columns where BLAS has no call for half of one.
WHOLE_COLUMNS = 256
#: Products of rows with more columns are added in packed storage, where LAPACK can: below, squares
#: are small, and adding to them is up to a fifth faster where rows are many.
SQUARE_COLUMNS = 1024
#: Products of so few columns are made whole: half of one takes longer to call for. Of 1,600 rows of
#: 33 columns they take 77 in place of 106 µs, of 65 the same (one core, float32).
FEW_COLUMNS = 48
#: So many entries are converted at a time: they stay in the cache until they are multiplied.
CACHED_ENTRIES = 2**18
#: Products in lower precision than that of the sums are of so many rows, or of one call's.
MANY_ROWS = 2**14


@dataclass(frozen=True)
class Gram:
    """Σ row rowᵀ for each of b stacks. Few rows are kept as they are: they need less memory.

    Args:
        packed: sums as by `packed.pack`, or (b, 0, 0) while there are none.
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

    def to(self, device: torch.device) -> "Gram":
        """The same on a device."""
        return Gram(self.packed.to(device), self.rows.to(device))

    def clone(self) -> "Gram":
        """The same in tensors of its own."""
        return Gram(self.packed.clone(), self.rows.clone())

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
        sums = _blank(b, i, self.packed)
        if k:
            add_products(sums, self.rows)
        packed = _as_packed(sums, i)
        return Gram(
            packed.add_(self.packed) if self.packed.numel() else packed,
            self.rows.new_empty(b, 0, i),
        )

    def summed(self) -> Tensor:
        """The packed sums of all rows, in a tensor of their own."""
        return self._multiplied().packed

    def as_sums(self) -> "Gram":
        """The same as sums of products alone."""
        return self._multiplied() if self.rows.shape[1] or not self.packed.numel() else self

    def compact(self) -> "Gram":
        """The same in what takes least memory: rows as they are, or sums alone."""
        k, i = self.rows.shape[1:]
        summed = k and (self.packed.numel() or 2 * k > i)
        return self._multiplied() if summed else self

    def matrices(self) -> Tensor:
        """The Gram matrices (b, i, i)."""
        summed = self.packed.numel() and not self.rows.numel()
        return unpack((self if summed else self._multiplied()).packed)

    def traces(self) -> Tensor:
        """Traces (b,) of the Gram matrices."""
        found = self.rows.to(self.packed.dtype).square().sum((1, 2))
        if self.packed.numel():
            found = found + _traces_of(self.packed)
        return found

    def eigenvalues(self, where: str) -> Tensor:
        """Eigenvalues (b, i), ascending, float64; of few rows those of their inner products."""
        k, i = self.rows.shape[1:]
        if self.packed.numel() or k >= i:
            return eigenvalues(self.matrices(), where)
        rows = self.rows.to(self.packed.dtype)
        found = eigenvalues(rows @ rows.mT, where)
        return torch.cat([found.new_zeros(len(found), i - k), found], -1)

    def basis(self, where: str) -> Basis:
        """Eigenvectors in the order of `eigenvalues`, float64."""
        return eigenbasis(self.matrices(), where)


def check_width(rows: Tensor, i: int) -> None:
    """Raise `UnsupportedUse` unless rows have i entries."""
    if rows.shape[-1] != i:
        raise UnsupportedUse(
            "a layer rule yields rows of another width than its matrix has",
            where="layer rule",
            got=f"{rows.shape[-1]} entries where the matrix has {i}",
            remedy="Let matrix=(b, o, i) agree with inputs (b, *lead, i) and output rows (o)",
        )


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
        dtype: the precision of products and sums.
    """

    def __init__(self, b: int, i: int, like: Tensor, dtype: SumDtype):
        self._b, self._i = b, i
        self._sum_like = like.new_empty(0, dtype=dtype.sums(like))
        self._product_like = like.new_empty(0, dtype=dtype.products(like))
        self._rows_dtype = accumulable(like.new_empty(0)).dtype
        self._rows: Tensor | None = None  # room for rows as long as they are few
        self._kept = 0  # how many there are
        self._products: Tensor | None = None  # not yet in the sums
        self._multiplied = 0  # rows in these products
        self._packed: Tensor | None = None  # sums of products
        self._ended = False
        self._many = False  # more rows will come than are kept

    def __len__(self) -> int:
        """Number of stacks."""
        return self._b

    def foresee(self, rows: int) -> None:
        """Multiply from the first row on if so many rows are more than are kept."""
        like = self._product_like.new_empty(0, self._i)
        self._many = rows > most_rows(like.to(self._rows_dtype))

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows (b', *lead, i) to the stacks from `start` on."""
        assert not self._ended, "the sums belong to a Gram already"
        if not rows.numel():
            return
        check_width(rows, self._i)
        if self._keeps(rows):
            return
        self._multiply_kept()
        self._multiply(rows, start)

    def _keeps(self, rows: Tensor) -> bool:
        """Keep rows if they and those before are few, and no products were made so far."""
        b, *lead, i = rows.shape
        k, room = prod(lead), most_rows(rows)
        has_products = self._products is not None or self._packed is not None
        if b < len(self) or self._kept + k > room or has_products or self._many:
            return False
        if self._rows is None:
            # In one piece: many small ones between large temporary ones would scatter the memory.
            self._rows = rows.new_empty(b, room, i)
        if self._rows.dtype != rows.dtype:
            return False
        self._rows[:, self._kept : self._kept + k] = rows.reshape(b, k, i)
        self._kept += k
        return True

    def _multiply_kept(self) -> None:
        """Turn rows that were kept into products."""
        if self._rows is not None:
            kept, self._rows = self._rows[:, : self._kept], None
            if self._kept:
                self._multiply(kept, 0)
            self._kept = 0

    def _multiply(self, rows: Tensor, start: int) -> None:
        """Add the products of rows."""
        if self._products is None:
            self._products = _blank(self._b, self._i, self._product_like)
        add_products(self._products[start : start + len(rows)], rows)
        self._multiplied += rows[0, ..., 0].numel()
        lower = self._product_like.dtype != self._sum_like.dtype
        if lower and self._multiplied >= MANY_ROWS:  # of many more rows their errors would grow
            self._sum_products()

    def _sum_products(self) -> Tensor:
        """Add the products to the sums; the sums, packed."""
        if self._products is None and self._packed is None:
            self._products = _blank(self._b, self._i, self._sum_like)
        if self._products is not None:
            packed = _as_packed(self._products, self._i).to(self._sum_like.dtype)
            self._packed = packed if self._packed is None else self._packed.add_(packed)
            self._products, self._multiplied = None, 0
        assert self._packed is not None
        return self._packed

    def gram(self) -> Gram:
        """The sum, which owns all that was summed: nothing can be added afterwards."""
        self._ended = True
        none = self._sum_like.new_empty(self._b, 0, self._i)
        if self._rows is not None:
            return Gram(none[..., :0], self._rows[:, : self._kept].clone())
        return Gram(self._sum_products(), none)

    def total(self) -> Tensor:
        """The sum so far as symmetric matrices (b, i, i)."""
        self._multiply_kept()
        return unpack(self._sum_products())

    def trace(self) -> Tensor:
        """Traces of the sum so far, shape (b,)."""
        if self._rows is not None:
            return self._rows[:, : self._kept].square().sum((1, 2))
        return _traces_of(self._sum_products())


def _traces_of(packed: Tensor) -> Tensor:
    upper, lower = diagonals(packed)
    return upper.sum(-1) + lower.sum(-1)


def _blank(b: int, i: int, like: Tensor) -> Tensor:
    """Zeros for sums of products of b stacks: packed where LAPACK can add to them so, or square."""
    lapack_can = b == 1 and like.device.type == "cpu" and like.dtype in RANK_K
    return packed_zeros(i, like) if lapack_can and i > SQUARE_COLUMNS else like.new_zeros(b, i, i)


def _as_packed(sums: Tensor, i: int) -> Tensor:
    """Sums of products packed, as they are or from the lower triangles of squares."""
    return pack(sums) if sums.shape[-1] == i else sums


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add Σ row rowᵀ of rows (b, *lead, i).

    Args:
        total: matrices (b, i, i) of which the lower triangles count, or one packed matrix on the
            CPU.
        rows: the rows.
    """
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
    few = total.shape[-1] == rows.shape[-1] <= FEW_COLUMNS
    add = _add_whole if few else _add_rank_k
    for piece in pieces:
        add(total[0], piece.to(total.dtype).reshape(-1, parts.shape[-1]))


#: What the calls of `_rank_k` can be made in.
RANK_K = frozenset({torch.float32, torch.float64})


@cache
def _rank_k(dtype: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """BLAS and LAPACK calls that add a product with its own transpose, half of it: torch has none.

    The first adds to a square, the second to packed storage; their numbers are the same up to
    rounding.
    """
    blas, lapack = scipy.linalg.blas, scipy.linalg.lapack
    single = dtype == torch.float32
    return (blas.ssyrk, lapack.ssfrk) if single else (blas.dsyrk, lapack.dsfrk)


def _add_whole(total: Tensor, rows: Tensor) -> None:
    """Add Σ row rowᵀ to one matrix (i, i)."""
    total.addmm_(rows.mT, rows)


def _add_rank_k(total: Tensor, rows: Tensor) -> None:
    """Add Σ row rowᵀ to one matrix (i, i), or to one that is packed, on the CPU."""
    note(len(rows) * rows.shape[-1] * (rows.shape[-1] + 1), total.dtype)
    rows = rows.contiguous()
    if not has_values(rows):
        return
    columns = rows.numpy().T
    to_square, to_packed = _rank_k(total.dtype)
    if total.shape[-1] == rows.shape[-1]:
        # In the memory order of Fortran our lower triangle is the upper one.
        to_square(1, columns, 1, total.numpy().T, lower=0, overwrite_c=1)
        return
    k, i = rows.shape
    # Our rectangle of the lower triangle is, in that order, its transpose.
    entries = total.view(-1).numpy()
    to_packed(i, k, 1, columns, 1, entries, transr="T", uplo="L", trans="N", overwrite_c=1)


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
