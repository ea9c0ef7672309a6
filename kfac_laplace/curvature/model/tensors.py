"""Tensors in nested arguments."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, inside lists, tuples and mappings."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from tensors_in(value)
    elif isinstance(nested, dict):
        yield from tensors_in(list(nested.values()))
