"""Plain data: equal by value, and sealed."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import check_seal, same, sealed

NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Pair:
    weights: Tensor
    name: str = "pair"


ALIKE = [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])),
    (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
    ({"a": torch.ones(3), "b": [1, "x", None]}, {"b": (1, "x", None), "a": torch.ones(3)}),
    (NAN, NAN),
    (numpy.ones(3), numpy.ones(3)),
    (Pair(torch.ones(2)), Pair(torch.ones(2))),
    (Pair, Pair),
]
DIFFERENT = [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])),
    (torch.ones(2), torch.ones(())),
    (torch.ones(2), [1.0, 1.0]),
    (torch.ones(2), None),
    (None, numpy.ones(2)),
    ({"a": torch.ones(3)}, {"a": torch.zeros(3)}),
    ({"a": 1}, {"a": 1, "b": 2}),
    ([1, 2], [1, 2, 3]),
    (Pair(torch.ones(2)), Pair(torch.zeros(2))),
    (numpy.ones(3), numpy.zeros(3)),
    (numpy.ones(3), 1.0),
]


@pytest.mark.parametrize(("one", "other"), ALIKE, ids=str)
def test_alike(one, other):
    assert same(one, other) and same(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=str)
def test_different(one, other):
    assert not same(one, other) and not same(other, one)


STATE = {
    "numbers": [1, 2.5, True, None],
    "patterns": {"a": 1.0, "b": 2.0},
    "tensor": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "expanded": torch.ones(()).expand(1),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "dtype": torch.float64,
}


def test_a_seal_holds_for_equal_contents():
    state = sealed(STATE)
    check_seal(copy.deepcopy(state), "state")
    moved = {**state, "turned": state["turned"].contiguous(), "expanded": torch.ones(1)}
    check_seal(moved, "state")
    assert sealed(state) == {**state}


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": [1, 2.5, True]},
        {"numbers": [1, 2.5, 1, None]},
        {"patterns": {"b": 2.0, "a": 1.0}},
        {"tensor": torch.arange(6.0).reshape(3, 2)},
        {"tensor": torch.arange(6).reshape(2, 3)},
        {"tensor": torch.nextafter(STATE["tensor"], torch.tensor(9.0))},
        {"half": -torch.ones(3, dtype=torch.bfloat16)},
        {"none": torch.empty(4, 0)},
        {"dtype": torch.float32},
        {"more": 1},
    ],
    ids=str,
)
def test_a_seal_breaks_with_any_change(change):
    with pytest.raises(InvalidValue, match="not those that were saved"):
        check_seal({**sealed(STATE), **change}, "state")


def test_a_part_with_a_seal_of_its_own_stands_in_by_it():
    """So large parts are read once."""
    inner = sealed({"x": torch.ones(2)})
    state = sealed({"inner": inner, "y": 1})
    check_seal({**state, "inner": {"checksum": inner["checksum"]}}, "state")
    with pytest.raises(InvalidValue):
        check_seal({**state, "inner": sealed({"x": torch.zeros(2)})}, "state")
