"""Counts floating-point operations and bytes of tensors while a computation runs."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kfac_laplace.curvature.linalg.operations import counted
from kfac_laplace.planning.decompositions import EIGENVALUES, EIGENVECTORS

aten = torch.ops.aten


@dataclass(frozen=True)
class Operations:
    """Floating-point operations; an addition and a multiplication are two.

    Args:
        single: in float32 and below.
        double: in float64.
    """

    single: float = 0.0
    double: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.single + self.double

    @property
    def work(self) -> float:
        """In units of those in float32, of which processors do twice as many in the same time."""
        return self.single + 2 * self.double

    def __add__(self, other: "Operations") -> "Operations":
        """Both."""
        return Operations(self.single + other.single, self.double + other.double)

    def __mul__(self, times: float) -> "Operations":
        """So many times as many."""
        return Operations(times * self.single, times * self.double)


@dataclass
class _Live:
    """Storages that exist: bytes by the address of each, and in all."""

    storages: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    total: int = 0


class Count(TorchDispatchMode):
    """Counts while it is active, by part of the work.

    Products, convolutions and attention count as `torch.utils.flop_counter` has them; to these come
    symmetric products by BLAS, products of stacks and decompositions. Elementwise functions, norms
    and copies count no operations. Bytes are those of storages, as long as any tensor or graph
    holds them: what kernels and libraries take inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: dict[str, Operations] = {}
        self.peaks: dict[str, int] = {}
        self._part = ""
        self._live = _Live()

    @contextmanager
    def watching(self) -> Iterator["Count"]:
        """Count inside, calls of BLAS as well."""
        with counted(self._add), self:
            yield self

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count the bytes of none of these: they were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live.storages.setdefault(storage._cdata, weakref.ref(storage))

    def enter(self, part: str) -> None:
        """Count what follows for another part of the work."""
        self._part = part
        self.peaks.setdefault(part, self._live.total)
        self._see_peak()

    def of(self, part: str) -> Operations:
        """What was counted for a part."""
        return self._operations.get(part, Operations())

    def of_peak(self, part: str) -> int:
        """Most bytes at one time in a part."""
        return self.peaks.get(part, 0)

    @property
    def live(self) -> int:
        """Bytes of the tensors made inside that exist now."""
        return self._live.total

    @property
    def peak(self) -> int:
        """Most bytes at one time, whatever the part."""
        return max(self.peaks.values(), default=0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = OPERATIONS.get(func._overloadpacket)
        if formula is not None:
            first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self._add(formula(*args, **kwargs, out_val=out), first.dtype)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return out

    def _add(self, operations: int, dtype: torch.dtype) -> None:
        double = dtype in (torch.float64, torch.complex128)
        more = Operations(0.0, operations) if double else Operations(operations)
        self._operations[self._part] = self.of(self._part) + more

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size, live = storage._cdata, storage.nbytes(), self._live
        if address in live.storages:
            return

        def gone(_: object) -> None:
            if live.storages.pop(address, None) is not None:
                live.total -= size

        live.storages[address] = weakref.ref(storage, gone)
        live.total += size
        self._see_peak()

    def _see_peak(self) -> None:
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), self._live.total)


def _stacked(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """total + Σ_m left_m right_m."""
    left, right = args[1], args[2]
    return 2 * prod(left.shape) * right.shape[-1]


def _cubed(constant: float) -> Callable[..., int]:
    """A decomposition of square matrices."""

    def operations(matrix: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(constant * prod(matrix.shape) * matrix.shape[-1])

    return operations


def _eigen(
    matrix: Tensor, uplo: str = "L", vectors: bool = True, *, out_val: Any = None, **kwargs: Any
) -> int:
    constant = EIGENVECTORS if vectors else EIGENVALUES
    return int(constant * prod(matrix.shape) * matrix.shape[-1])


#: takes the arguments of a call and its result to floating-point operations
OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addbmm: _stacked,
    aten.addbmm_: _stacked,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._linalg_eigh: _eigen,
    aten.linalg_cholesky_ex: _cubed(1 / 3),
}
