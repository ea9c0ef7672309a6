"""Equality to the last bit, kinds of numbers and order of entries included."""

from __future__ import annotations

import dataclasses
import math

import torch


def assert_same_bits(one, other, where="value"):
    """Tensors by dtype, shape and bits; mappings with their order; all else by ==."""
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        assert type(one) is type(other), where
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert_same_bits(a, b, f"{where}.{field.name}")
    elif isinstance(one, dict):
        assert [*one] == [*other], where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(a, b, f"{where}[{k}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        flat = [t.detach().reshape(-1).clone().view(torch.uint8) for t in (one, other)]
        assert torch.equal(*flat), where
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other), where
    else:
        assert one == other, where
