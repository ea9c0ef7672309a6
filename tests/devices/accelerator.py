"""A second device for machines that have none: its numbers are the CPU's, under another name.

To torch it is a backend as any in C++: tensors on "accel:0", with autograd and its threads. What
meets a tensor of the CPU by mistake is refused as on a GPU; what has the CPU wait is counted, and
so are the bytes that the device holds. A process that imports this has the device until it ends:
tests run it in processes of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from devices.watch import HELD, wait
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "accel"
#: Calls that may have tensors of both devices.
BRIDGES = {
    "_copy_from",
    "_to_copy",
    "copy_",
    "index",
    "index_put_",
    "_index_put_impl_",
    "_pin_memory",
}
#: Calls whose answer is a Python number, or whose shapes depend on numbers: the CPU waits for them.
WAITS = {
    "_local_scalar_dense",
    "_linalg_eigh",
    "_linalg_svd",
    "equal",
    "is_nonzero",
    "linalg_cholesky_ex",
    "masked_select",
    "nonzero",
    "bincount",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class _Module:
    """What `torch.accel` is."""

    Stream = torch.Stream
    Event = torch.Event

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        GENERATOR.manual_seed(seed)

    def manual_seed(self, seed: int) -> None:
        GENERATOR.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return GENERATOR.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        GENERATOR.set_state(state)

    def synchronize(self, device: Any = None) -> None:
        wait("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


#: The device's own source of randomness.
GENERATOR = torch.Generator()
_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor of the device: one of the CPU that only calls on the device reach."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        HELD.enter(raw)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: Tensor) -> None:
        Tensor.data.__set__(self, other)
        self.raw = other.raw

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        wait("tolist")
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, *args, **(kwargs or {}))


def moved(model: nn.Module) -> nn.Module:
    """The model on the device. `to` would make tied parameters several, as of any subclass."""
    memo: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    if tensor not in memo:
                        there = tensor.detach().to(DEVICE)
                        parameter = isinstance(tensor, nn.Parameter)
                        needs = tensor.requires_grad
                        memo[tensor] = nn.Parameter(there, needs) if parameter else there
                    kept[name] = memo[tensor]
    return model


def _called(op: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of torch on raw numbers; refused where tensors of the two devices meet."""
    name = op.overloadpacket.__name__
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    mine = {id(t.raw): t for t in tensors if isinstance(t, OnDevice)}
    others = [t for t in tensors if not isinstance(t, OnDevice)]
    number_may = torch.Tag.pointwise in op.tags
    strangers = [t for t in others if t.ndim or not number_may]
    if mine and strangers and name not in BRIDGES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} met {DEVICE} and the CPU"
        )
    if mine and name not in BRIDGES and any(t.device.type == "meta" for t in others):
        raise RuntimeError(f"{op} met {DEVICE} and meta")
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if target == DEVICE else target}
    if name in {
        "rand",
        "randn",
        "randint",
        "bernoulli_",
        "normal_",
        "uniform_",
        "random_",
        "randperm",
    }:
        given = kwargs.get("generator")
        if given is not None and mine:
            raise RuntimeError(f"Expected a {DEVICE.type} generator, but found one of the CPU")
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    leaves_device = target is not None and target != DEVICE
    boolean = name in {"index", "index_put_", "_index_put_impl_"} and any(
        isinstance(t, OnDevice) and t.dtype == torch.bool for t in (args[1] or ()) if t is not None
    )
    crosses = name in {"_to_copy", "copy_"} and bool(mine) and (leaves_device or bool(others))
    if (name in WAITS and mine) or boolean or (crosses and not _goes_on(name, args, kwargs)):
        wait(name)
    raw_args, raw_kwargs = tree_map(_raw, (args, kwargs))
    with _own_draws() if torch.Tag.nondeterministic_seeded in op.tags else nullcontext():
        out = op(*raw_args, **raw_kwargs)

    def wrapped(made: Any) -> Any:
        if not isinstance(made, Tensor):
            return made
        if id(made) in mine:
            old = mine[id(made)]
            if torch.Tag.inplace_view in op.tags:
                _reshape_alike(op, args, kwargs)
            assert made.shape == old.shape, f"{op} changed the shape of a tensor in place"
            return old
        return made if leaves_device else OnDevice(made)

    return tree_map(wrapped, out)


def _reshape_alike(op: Any, args: Any, kwargs: Any) -> None:
    """Have a call that changes a tensor's shape in place change what torch knows of ours."""
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            op(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


@contextmanager
def _own_draws() -> Iterator[None]:
    """What a call draws without a generator is drawn from the device's own."""
    before = torch.get_rng_state()
    torch.set_rng_state(GENERATOR.get_state())
    try:
        yield
    finally:
        GENERATOR.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _goes_on(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy was asked for that is not waited for."""
    return kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])


def _raw(leaf: Any) -> Any:
    return leaf.raw if isinstance(leaf, OnDevice) else leaf


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return OnDevice(
        torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    )


def _empty_strided(
    size: Any,
    stride: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not non_blocking and isinstance(source, OnDevice) != isinstance(target, OnDevice):
        wait("copy to the device" if isinstance(target, OnDevice) else "copy to the CPU")
    _raw(target).copy_(_raw(source))
    return target


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(_called, "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
_ATEN.impl("empty.memory_format", _empty, "PrivateUse1")
_ATEN.impl("empty_strided", _empty_strided, "PrivateUse1")
_ATEN.impl("_copy_from", _copy_from, "PrivateUse1")


#: Calls that make tensors by filling empty ones of another size.
FACTORIES = (
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "linspace",
    "logspace",
    "randperm",
    "tril_indices",
    "triu_indices",
)


def _factory(name: str) -> Any:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        return OnDevice(op(*args, device="cpu", **kwargs))

    return make


for _name in FACTORIES:
    _ATEN.impl(_name, _factory(_name), "PrivateUse1")
