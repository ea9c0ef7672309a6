"""Nested plain data as named tensors beside JSON, and back: every value, kind and order returns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.states.lossless import Small
from kfac_laplace.states.stored import REMEDY, refusing_damage

#: In JSON, a mapping with this key is a value for which JSON has no word.
KIND = "$"
DTYPES = {f"{d}".removeprefix("torch."): d for d in vars(torch).values() if type(d) is torch.dtype}
#: What tensors are stored as: all that every reader of safetensors files knows.
STORABLE = {
    f"{dtype}".removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
#: Kinds of values that one word tells.
WORDS: dict[str, Callable[[str], object]] = {
    "dtype": DTYPES.__getitem__,
    "device": torch.device,
    "float": float,
}
#: No name of a tensor: the header's own words stand there.
RESERVED = "__metadata__"


@dataclass
class Flattened:
    """A state taken apart.

    Args:
        tensors: as they are stored, by name: the keys on the way to them.
        tree: all else, as JSON has it, with the names where tensors were.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tree: Any = None

    @classmethod
    def of(cls, state: Any) -> "Flattened":
        """Plain data taken apart, as `plain.check_plain` knows them.

        Raises:
            InvalidType: a tensor that is sparse, complex or without data.
        """
        made = cls()
        made.tree = made._flat(state, ())
        return made

    def _flat(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            pairs = [(key, self._flat(inner, (*path, str(key)))) for key, inner in value.items()]
            if all(isinstance(key, str) and key != KIND for key in value):
                return dict(pairs)
            return {KIND: "mapping", "pairs": [[self._flat(key, path), v] for key, v in pairs]}
        if isinstance(value, list | tuple):
            entries = [self._flat(inner, (*path, str(k))) for k, inner in enumerate(value)]
            return entries if isinstance(value, list) else {KIND: "tuple", "entries": entries}
        if isinstance(value, Tensor):
            return self._with(value, path)
        if isinstance(value, torch.dtype):
            return {KIND: "dtype", "name": f"{value}".removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {KIND: "device", "name": f"{value}"}
        if isinstance(value, float) and not math.isfinite(value):
            return {KIND: "float", "name": f"{value}"}
        return value

    def _with(self, tensor: Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        """Store a tensor; what stands in its place."""
        plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
        if not plain or tensor.dtype not in STORABLE.values():
            raise InvalidType(
                "no tensor that a .safetensors file can hold",
                where=".".join(path),
                got=f"{tensor.layout}, {tensor.dtype}" if plain or not tensor.is_meta else "meta",
                remedy="Save to a file of another suffix, such as posterior.pt",
            )
        small = Small.of(tensor.cpu())
        name = ".".join(path)
        while name in self.tensors or name == RESERVED:  # keys may have dots in them
            name += "'"
        self.tensors[name] = small.stored
        return {
            KIND: "tensor",
            "name": name,
            "dtype": f"{small.dtype}".removeprefix("torch."),
            "stored": f"{small.stored.dtype}".removeprefix("torch."),
            "shape": list(small.stored.shape),
            **({} if small.rows is None else {"symmetric": small.rows}),
        }

    def state(self) -> Any:
        """The state put together again, in the memory of the tensors where they are as they were.

        Raises:
            InvalidValue: a tensor is missing, too many, or not as the tree says; no such tree.
        """
        left = dict(self.tensors)
        with refusing_damage("header"):
            state = _nested(self.tree, left)
        if left:
            raise InvalidValue(
                "a tensor belongs to nothing", where=next(iter(left)), got=_so_many(left)
            )
        return state


def _so_many(names: Mapping[str, Any]) -> str:
    return f"{len(names)} such tensors" if len(names) > 1 else "one such tensor"


def _nested(value: Any, left: dict[str, Tensor]) -> Any:
    """The value that JSON stands for; tensors are taken out of `left`."""
    if isinstance(value, list):
        return [_nested(inner, left) for inner in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: _nested(inner, left) for key, inner in value.items()}
    if kind == "tuple":
        return tuple(_nested(inner, left) for inner in value["entries"])
    if kind == "mapping":
        return {_nested(key, left): _nested(inner, left) for key, inner in value["pairs"]}
    if kind == "tensor":
        return _tensor(value, left)
    return WORDS[kind](value["name"])


def _tensor(told: dict[str, Any], left: dict[str, Tensor]) -> Tensor:
    """A tensor that the tree names."""
    name, dtype = told["name"], STORABLE[told["dtype"]]
    if name not in left:
        raise InvalidValue("a tensor is missing", where=name, remedy=REMEDY)
    stored = left.pop(name)
    wanted, shape = STORABLE[told["stored"]], tuple(told["shape"])
    if stored.dtype != wanted or stored.shape != shape:
        raise InvalidValue(
            f"a tensor {shape} of {wanted} is needed",
            where=name,
            got=f"{tuple(stored.shape)} of {stored.dtype}",
            remedy=REMEDY,
        )
    rows = told.get("symmetric")
    if rows is not None and (rows < 2 or stored.shape[-1] != rows * (rows + 1) // 2):
        raise InvalidValue(
            "no triangle of a matrix", where=name, got=f"{shape} for {rows} rows", remedy=REMEDY
        )
    return Small(stored, dtype, rows).tensor()
