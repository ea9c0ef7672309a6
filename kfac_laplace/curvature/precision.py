"""In which precision curvature is summed, and the sums of symmetric products."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from scipy.linalg import blas
from torch import Tensor

from kfac_laplace.curvature.symmetric import mirror_, pack, unpack


def accumulable(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: gradients and rows in half precision lose the curvature."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


#: "auto" or a dtype.
FactorDtype = torch.dtype | Literal["auto"]
FACTOR_DTYPES = ("auto", torch.float64, torch.float32)

_CHOSEN: ContextVar[FactorDtype] = ContextVar("factor dtype", default="auto")
_SHARED = ContextVar("shared rows", default=False)


@contextmanager
def sums_in(dtype: FactorDtype) -> Iterator[None]:
    """Sum products of rows in this precision, or in that of the rows if that is higher."""
    token = _CHOSEN.set(dtype)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@contextmanager
def rows_of(shared: bool) -> Iterator[None]:
    """Say whether examples have many rows each, at shared positions."""
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which products of the tensor are summed, where the device has it.

    Products in float32 leave eigenvalue errors of about 1e-7 λ_max. A Kronecker product multiplies
    them by the other factor's largest eigenvalue, which easily exceeds a small prior precision:
    on rank-deficient inputs the evidence is then wrong by tens of nats and more.
    """
    in_double = tensor.device.type != "mps" and _CHOSEN.get() != torch.float32
    return torch.float64 if in_double else accumulable(tensor.new_empty(0)).dtype


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of products before they are summed: by "auto" the rows' own if they are many.

    Where every example has many rows, their errors average out and factors are rarely
    rank-deficient.
    """
    if _CHOSEN.get() == "auto" and _SHARED.get():
        return accumulable(tensor.new_empty(0)).dtype
    return sum_dtype(tensor)


def summable(tensor: Tensor) -> Tensor:
    """The tensor in the precision in which its products are summed."""
    return tensor.to(sum_dtype(tensor))


#: Symmetric products are halved down to so many columns where BLAS has no call for half of one.
WHOLE_COLUMNS = 256
#: So many entries are converted at a time: they stay in the cache until they are multiplied.
CACHED_ENTRIES = 2**18
#: From so many columns on few rows are searched for columns of zeros.
WIDE = 1024
#: Products in lower precision than that of the sums are of so many rows, or of one call's.
MANY_ROWS = 2**14


class GramSum:
    """Σ row rowᵀ of b stacks of rows, added to in place.

    Args:
        b: number of stacks.
        i: width of the rows.
        like: a tensor on the device and in the precision of the rows.
    """

    def __init__(self, b: int, i: int, like: Tensor):
        self._shape = (b, i, i)
        self._device, self._dtype = like.device, sum_dtype(like)
        self._product_dtype = product_dtype(like)
        self._sums: Tensor | None = None  # lower triangles
        self._packed: Tensor | None = None  # sums of products in lower precision
        self._filled = [False] * b
        self._products: Tensor | None = None  # in their own precision, not yet in the sums
        self._multiplied = 0  # rows in these products

    @classmethod
    def of(cls, matrices: Tensor) -> "GramSum":
        """A sum that begins with symmetric matrices (b, i, i), which become its own."""
        b, i = matrices.shape[:2]
        total = cls(b, i, matrices)
        total._sums, total._filled = matrices, [True] * len(matrices)
        return total

    def __len__(self) -> int:
        """Number of stacks."""
        return self._shape[0]

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows (b', *lead, i) to the stacks from `start` on."""
        if not rows.numel():
            return
        if self._product_dtype == self._dtype:
            self._add_to_sums(rows, start)
            return
        if self._products is None:
            self._products = torch.zeros(
                self._shape, dtype=self._product_dtype, device=self._device
            )
        _add_products(self._products[start : start + len(rows)], rows, beta=1)
        self._multiplied += rows[0, ..., 0].numel()
        if self._multiplied >= MANY_ROWS:
            self._sum_products()

    def _add_to_sums(self, rows: Tensor, start: int) -> None:
        """Add products in the precision of the sums; the first of each stack overwrites it."""
        stacks = range(start, start + len(rows))
        alive = _few_columns(rows) if len(self) == 1 else None
        if self._sums is None:
            make = torch.empty if alive is None else torch.zeros
            self._sums = make(self._shape, dtype=self._dtype, device=self._device)
            self._filled = [alive is not None] * len(self)
        filled = [self._filled[k] for k in stacks]
        if alive is not None:
            self._fill(stacks)
            part = GramSum(1, len(alive), self._sums)
            part.add(rows[..., alive])
            self._sums[0, alive[:, None], alive] += part.total()[0]
            return
        if any(filled) and not all(filled):
            self._fill(stacks)
        _add_products(self._sums[start : start + len(rows)], rows, beta=1 if any(filled) else 0)
        for k in stacks:
            self._filled[k] = True

    def _fill(self, stacks: range) -> None:
        """Make empty stacks zero."""
        assert self._sums is not None
        for k in stacks:
            if not self._filled[k]:
                self._sums[k].zero_()
                self._filled[k] = True

    def _sum_products(self) -> None:
        """Add the products to the sums: of many more rows their errors would grow."""
        if self._products is not None:
            packed = pack(self._products).to(self._dtype)
            self._packed = packed if self._packed is None else self._packed.add_(packed)
            self._products, self._multiplied = None, 0

    def packed(self) -> Tensor:
        """The sums as by `symmetric.pack`; they go on growing with what is added later."""
        self._sum_products()
        return pack(self._lower()) if self._packed is None else self._packed

    def total(self) -> Tensor:
        """The sums (b, i, i), symmetric."""
        self._sum_products()
        if self._packed is not None:
            return unpack(self._packed)
        total = self._lower()
        mirror_(total)
        return total

    def _lower(self) -> Tensor:
        """Sums with valid lower triangles, made if there are none."""
        if self._sums is None:
            self._sums = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._fill(range(len(self)))
        return self._sums


def _few_columns(rows: Tensor) -> Tensor | None:
    """Indices of the columns (i,) that are not zero, where a search for them pays and finds few."""
    i = rows.shape[-1]
    if i < WIDE or rows[..., 0].numel() > i // 4:
        return None
    alive = rows.flatten(0, -2).any(0).nonzero()[:, 0]
    return alive if 3 * len(alive) < 2 * i else None


def _add_products(total: Tensor, rows: Tensor, beta: int) -> None:
    """Make the lower triangles of `total` (b, i, i) beta · total + Σ row rowᵀ."""
    if len(rows) > 1:
        flat = rows.to(total.dtype).flatten(1, -2)
        total.baddbmm_(flat.mT, flat, beta=beta)
        return
    # Rows need not lie one after another: one piece or product for each entry of the first axis.
    parts = rows[0].reshape(-1, *rows.shape[-2:]) if rows.ndim > 2 else rows
    if parts.stride(-1) == 1:
        parts = parts.reshape(1, -1, rows.shape[-1])
    if total.device.type != "cpu" or total.dtype not in RANK_K:
        _add_stacks(total[0], parts.to(total.dtype), beta)
        return
    if parts.dtype == total.dtype and parts.is_contiguous():
        pieces: Iterable[Tensor] = [parts]
    elif len(parts) == 1:
        pieces = parts[0].split(max(1, CACHED_ENTRIES // parts.shape[-1]))
    else:
        pieces = parts.split(max(1, CACHED_ENTRIES // parts[0].numel()))
    for piece in pieces:
        _add_rank_k(total[0], piece.to(total.dtype).reshape(-1, parts.shape[-1]), beta)
        beta = 1


#: BLAS calls that add a product with its own transpose, half of it: torch has none.
RANK_K = {torch.float32: blas.ssyrk, torch.float64: blas.dsyrk}


def _add_rank_k(total: Tensor, rows: Tensor, beta: int) -> None:
    """Make the lower triangle of `total` (i, i) beta · total + Σ row rowᵀ, on the CPU."""
    columns = rows.contiguous().numpy().T
    # In the memory order of Fortran our lower triangle is the upper one.
    RANK_K[total.dtype](1, columns, beta, total.numpy().T, lower=0, overwrite_c=1)


def _add_stacks(total: Tensor, stacks: Tensor, beta: int) -> None:
    """Make the lower triangle of `total` (i, i) beta · total + Σ stackᵀ stack, stacks (m, r, i)."""
    i = stacks.shape[-1]
    if i <= WHOLE_COLUMNS:
        total.addbmm_(stacks.mT, stacks, beta=beta)
        return
    half = i // 2
    left, right = stacks[..., :half], stacks[..., half:]
    total[half:, :half].addbmm_(right.mT, left, beta=beta)
    _add_stacks(total[:half, :half], left, beta)
    _add_stacks(total[half:, half:], right, beta)


def gram(rows: Tensor) -> Tensor:
    """Σ row rowᵀ (b, i, i) of rows (b, *lead, i), in float64 where the device has it."""
    total = GramSum(len(rows), rows.shape[-1], rows)
    total.add(rows)
    return total.total()


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast does not round our own products."""
    return torch.autocast(device.type, enabled=False)
