"""Nested plain data as tensors and JSON: all comes back, through JSON's text."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.states.flat import RESERVED, Flattened
from kfac_laplace.states.plain import same

STATES = {
    "nothing": {},
    "None": None,
    "a number": 0.1,
    "a tensor": torch.arange(3.0),
    "leaves": [1, 10**30, True, False, None, "text", "\udc80 ü\n", "", 1e-320, -0.0, 0.1 + 0.2],
    "no finite numbers": [float("inf"), -float("inf")],
    "torch's": {"dtype": torch.bfloat16, "device": torch.device("cuda:1")},
    "tuples": {"a": (1, (2, [3, ()])), "b": []},
    "keys of any kind": {0: {1.5: "a", None: "b"}, "x": {True: torch.ones(2), (): 1}},
    "keys that mean something": {"$": 1, "in": {"$": "tensor", "name": "x"}, RESERVED: 2},
    "tensors by odd names": {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}, "": torch.ones(3)},
    "a reserved name": {RESERVED: torch.ones(4)},
    "an optimiser's": {"state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2, 2)}}},
    "deep": {"a": [{"b": [{"c": torch.ones(1)}]}]},
}


def through_text(state):
    flat = Flattened.of(state)
    assert all(type(name) is str and name != RESERVED for name in flat.tensors)
    return Flattened(flat.tensors, json.loads(json.dumps(flat.tree, allow_nan=False))).state()


def kinds(value):
    """The types all the way down, and the order of keys."""
    if isinstance(value, dict):
        return [(kinds(key), kinds(inner)) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [kinds(inner) for inner in value]
    return value.dtype if isinstance(value, torch.Tensor) else (type(value), repr(value))


@pytest.mark.parametrize("name", STATES)
def test_states_come_back(name):
    again = through_text(STATES[name])
    assert kinds(again) == kinds(STATES[name]) and same(again, STATES[name])


def test_nan_comes_back():
    assert through_text([float("nan")])[0] != through_text([float("nan")])[0]


def test_parameters_come_back_as_tensors():
    weight = nn.Linear(2, 2).weight
    again = through_text([weight])[0]
    assert type(again) is torch.Tensor and torch.equal(again, weight)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, device="meta"),
    ],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_that_no_such_file_holds(tensor):
    with pytest.raises(InvalidType, match=r"a\.1: no tensor that a .safetensors.*posterior\.pt"):
        Flattened.of({"a": [0, tensor]})


FLAT = {"kept": torch.ones(2), "square": torch.eye(3, dtype=torch.float64) * 0.1}


def changed_tree(entry, **told):
    flat = Flattened.of(FLAT)
    flat.tree[entry].update(told)
    return flat


DAMAGED = {
    "another dtype": (changed_tree("kept", stored="float64"), "kept: a tensor .* of torch.float64"),
    "another shape": (changed_tree("kept", shape=[3]), r"kept: a tensor \(3,\)"),
    "no dtype": (changed_tree("kept", dtype="float65"), "float65"),
    "another name": (changed_tree("kept", name="other"), "other: a tensor is missing"),
    "twice": (changed_tree("square", name="kept"), "kept: a tensor is missing|is needed"),
    "no triangle": (changed_tree("square", symmetric=4), "no triangle.*4 rows"),
    "no rows": (changed_tree("square", symmetric="3"), "header"),
    "no list": (changed_tree("kept", shape=None), "header"),
    "kind": (Flattened({}, {"$": "code", "name": "x"}), "header: .*code"),
    "keys": (Flattened({}, {"$": "mapping", "pairs": [[[], 1]]}), "header"),
    "pairs": (Flattened({}, {"$": "mapping", "pairs": [1]}), "header"),
    "number": (Flattened({}, {"$": "float", "name": "many"}), "header"),
    "device": (Flattened({}, {"$": "device", "name": "nowhere"}), "header"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_trees(kind):
    flat, says = DAMAGED[kind]
    with pytest.raises(InvalidValue, match=says) as caught:
        flat.state()
    assert "\n" not in str(caught.value)


def test_tensors_too_many_and_too_few():
    flat = Flattened.of(FLAT)
    with pytest.raises(InvalidValue, match="more: a tensor belongs to nothing"):
        Flattened(flat.tensors | {"more": torch.ones(1)}, flat.tree).state()
    with pytest.raises(InvalidValue, match="square: a tensor is missing"):
        Flattened({"kept": flat.tensors["kept"]}, flat.tree).state()
