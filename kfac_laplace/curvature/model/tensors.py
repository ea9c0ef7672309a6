"""Tensors in nested arguments, and tensors that are shapes alone."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, inside lists, tuples and mappings."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from tensors_in(value)
    elif isinstance(nested, dict):
        yield from tensors_in(list(nested.values()))


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers in it: not on the meta device, nor where shapes alone are run."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)
