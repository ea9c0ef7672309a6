"""Tensors and plain data: equal by value, fit for a file, and sealed by a checksum."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from kfac_laplace.errors import InvalidType, InvalidValue

#: Leaves that `torch.load(weights_only=True)` reads, tensors aside.
LEAVES = (str, int, float, bool, type(None), torch.dtype, torch.device)
CHECKSUM = "checksum"


def same(one: object, other: object) -> bool:
    """Whether two values are equal, tensors and what holds them by value, on whatever device.

    Lists and tuples are alike, NaN equals NaN, and what cannot be compared differs.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _same_tensors(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, numpy.ndarray) and isinstance(other, numpy.ndarray):
        return numpy.array_equal(one, other)
    if is_dataclass(one) and type(one) is type(other) and not isinstance(one, type):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    try:
        return one is other or bool(one == other) or bool(one != one and other != other)
    except (TypeError, ValueError, RuntimeError):  # arrays have no one answer
        return False


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    a, b = (tensor.detach().cpu().to(dtype) for tensor in (one, other))
    return bool(((a == b) | ((a != a) & (b != b))).all())


def check_plain(value: object, where: str = "state") -> None:
    """Raise `InvalidType` unless a value is made of what a safely read file can hold."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(key, f"{where}, a key")
            check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for k, inner in enumerate(value):
            check_plain(inner, f"{where}[{k}]")
    elif type(value) not in (*LEAVES, Tensor, nn.Parameter):
        raise InvalidType(
            "not plain data, and files hold nothing else",
            where=where,
            got=type(value).__name__,
            remedy="Let options() return tensors, numbers, strings, lists and dictionaries",
        )


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with the checksum of its contents: torch checks none of what it reads."""
    return {**state, CHECKSUM: _checksum(state)}


def check_seal(state: Mapping[str, Any], where: str) -> None:
    """Raise `InvalidValue` if a state is not what was sealed."""
    if state[CHECKSUM] != _checksum(state):
        raise InvalidValue(
            "the contents are not those that were saved",
            where=where,
            got="another checksum",
            remedy="Use an undamaged copy, or fit and save again. What is to differ, as "
            "hyperparameters, is set after loading",
        )


def _checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of the contents; parts with a seal of their own stand in it by that."""
    found = hashlib.sha256()
    own = {
        key: value[CHECKSUM] if isinstance(value, Mapping) and CHECKSUM in value else value
        for key, value in state.items()
        if key != CHECKSUM
    }
    _feed(found.update, own)
    return found.hexdigest()


def _feed(update: Callable[[Any], None], value: Any) -> None:
    """Every leaf with its kind; the order of mappings counts, as that of patterns does."""
    if isinstance(value, numpy.generic | numpy.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        update(f"mapping {len(value)};".encode())
        for pair in value.items():
            _feed(update, pair)
    elif isinstance(value, list | tuple):
        update(f"list {len(value)};".encode())
        for inner in value:
            _feed(update, inner)
    elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.stride(0) != 1:  # one entry that was expanded
            flat = flat.new_empty(flat.shape).copy_(flat)
        update(flat.view(torch.uint8).numpy())
    elif isinstance(value, LEAVES):
        update(f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass"))
    else:  # of a user's own, in memory: compared by equality, where at all
        update(f"object {type(value).__qualname__};".encode())
