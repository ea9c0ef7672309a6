"""Containers and objects in which models keep activations: what is entered, and how it is left."""

from __future__ import annotations

import builtins
import copy
import logging
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training


class Recorder:
    """A callable that lists what it sees, in a slot."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, h: Tensor) -> None:
        self.seen.append(h)


class Called:
    """A callable with attributes."""

    last: Any = None

    def __call__(self, h: Tensor) -> None:
        self.last = h


@dataclass(slots=True, frozen=True)
class Frozen:
    """Values in slots that nobody may write to."""

    h: Any = None


class Growing(list[Any]):
    """A list that can only grow."""

    def __setitem__(self, *_: Any) -> None:
        raise RuntimeError("only append")

    __delitem__ = __setitem__


class ReadOnly(dict[str, Any]):
    """A mapping that refuses its methods; and one with attributes beside its entries."""

    def _no(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("read-only")

    __setitem__ = __delitem__ = update = pop = clear = _no  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return ReadOnly, (dict(self),)


class Output(OrderedDict[str, Any]):
    """Entries that are attributes as well, as in transformers."""

    def __init__(self, h: Tensor):
        super().__init__()
        super().__setitem__("h", h)
        self.__dict__["h"] = h

    def _no(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("read-only")

    __delitem__ = update = pop = setdefault = _no  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return Output, (self["h"],)


class Keeps(nn.Module):
    """Two layers; a function keeps the hidden values."""

    def __init__(self, keep: Callable[[Keeps, Tensor], Any]):
        super().__init__()
        self.a, self.head, self.keep = nn.Linear(3, 4), nn.Linear(4, 2), keep
        self.last: Any = None
        self.named: dict[str, Any] = OrderedDict()
        self.all: list[Any] = []
        self.space, self.record, self.called = SimpleNamespace(), Recorder(), Called()
        self.frozen, self.growing, self.fixed = Frozen(), Growing(), ReadOnly(one=1)
        self.deep: list[Any] = [[[[[[]]]]]]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.keep(self, h)
        return self.head(h)


def attribute(m: Keeps, h: Tensor) -> None:
    m.last = h


KEEPERS: dict[str, tuple[Callable[[Keeps, Tensor], Any], Callable[[Keeps], Any]]] = {
    "recorder": (lambda m, h: m.record(h), lambda m: m.record.seen),
    "callable": (lambda m, h: m.called(h), lambda m: [m.called.last]),
    "callable in a list": (
        lambda m, h: [m.all.append(Called()), m.all[-1](h)],
        lambda m: [one.last for one in m.all],
    ),
    "frozen slots": (
        lambda m, h: object.__setattr__(m.frozen, "h", [h]),
        lambda m: m.frozen.h or [],
    ),
    "growing list": (lambda m, h: m.growing.append(h), lambda m: m.growing),
    "read-only mapping": (
        lambda m, h: dict.__setitem__(m.fixed, "h", h),
        lambda m: [m.fixed.get("h")],
    ),
    "output": (
        lambda m, h: setattr(m, "last", Output(h)),
        lambda m: m.last and [m.last["h"], m.last.h],
    ),
    "view in an output": (
        lambda m, h: setattr(m, "last", Output(h[:, 1:])),
        lambda m: m.last and [m.last["h"], m.last.h],
    ),
    "what torch returns": (lambda m, h: setattr(m, "last", h.max(0)), lambda m: m.last),
    "deep": (
        lambda m, h: m.deep[0][0][0][0][0].append(h),
        lambda m: m.deep[0][0][0][0][0],
    ),
}

CALLS: dict[str, Callable[[nn.Module, list], Any]] = {
    "fit": lambda m, b: copy.deepcopy(Laplace(m).fit(b)),
    "diag": lambda m, b: Laplace(m, hessian_structure="diag").fit(b),
    "glm": lambda m, b: Laplace(m).fit(b)(b[0][0]),
    "linear": lambda m, b: Laplace(m).fit(b)(b[0][0], pred_type="linear", n_samples=2),
    "tuner": lambda m, b: MarglikTuner(m, "classification", 8).step(b),
    "training": lambda m, b: marglik_training(m, b, n_epochs=2),
}


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    return [(x[:5], y[:5]), (x[5:], y[5:])]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KEEPERS)
def test_no_graph_is_left(name, call):
    torch.manual_seed(0)
    keep, held = KEEPERS[name]
    model = Keeps(keep).double()
    CALLS[call](model, data())
    for tensor in held(model) or []:
        assert tensor is None or not tensor.requires_grad
    copy.deepcopy({k: v for k, v in vars(model).items() if k != "keep"})


def test_what_is_code_is_never_entered():
    """Modules, classes, functions and scopes: their contents are not the model's."""
    torch.manual_seed(0)
    model, batches = Keeps(attribute).double(), data()
    model.np, model.F, model.torch = np, torch.nn.functional, torch
    model.space.library, model.named["np"] = np.linalg, [np]
    model.kind, model.function, model.scope = Called, data, globals()
    model.builtins, model.modules_by_name = vars(builtins), sys.modules
    model.log = logging.getLogger("a model's")
    before = [dict(vars(module)) for module in (builtins, np, torch.nn.functional, sys)]
    scope, loaded, kind = dict(globals()), dict(sys.modules), dict(vars(Called))
    la = Laplace(model).fit(batches)
    la(batches[0][0])
    MarglikTuner(model, "classification", 8).step(batches)
    assert before == [vars(module) for module in (builtins, np, torch.nn.functional, sys)]
    assert scope == globals() and kind == dict(vars(Called))
    assert all(sys.modules[name] is module for name, module in loaded.items())
    assert model.last is None


class LoadsLate(nn.Module):
    """Fills a scope and the registry of a library, behind an attribute, in its pass."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.last = nn.Linear(3, 2), None
        self.library = types.ModuleType("library")
        self.library.cache = {}

    def forward(self, x: Tensor) -> Tensor:
        self.library.cache["loaded"] = True
        self.last = self.lin(x)
        return self.last


def test_what_a_pass_does_to_libraries_stays():
    model = LoadsLate().double()
    Laplace(model).fit(data())
    assert model.library.cache == {"loaded": True} and model.last is None


def test_a_model_that_keeps_its_last_transformers_output():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    made = outputs.SequenceClassifierOutput

    def keep(m: Keeps, h: Tensor) -> None:
        m.last = made(logits=h, hidden_states=(h, h[:, 1:]))

    model, batches = Keeps(keep).double(), data()
    Laplace(model).fit(batches)(batches[0][0])
    assert model.last is None
    with torch.no_grad():
        model(batches[0][0])
    held, entries = model.last, dict(model.last)
    Laplace(model).fit(batches)
    assert model.last is held and all(held[key] is value for key, value in entries.items())
    copy.deepcopy(model.last)
    marglik_training(model, batches, n_epochs=1)
    assert not copy.deepcopy(model.last).logits.requires_grad


def test_containers_that_are_as_they_were_are_not_written_to():
    """Whoever looks at a mapping's own methods sees no call."""
    torch.manual_seed(0)
    model, batches = Keeps(attribute).double(), data()
    model.fixed = ReadOnly(one=[1], two={"three": ReadOnly(four=4)})
    order = OrderedDict.fromkeys("abc")
    model.named = order
    Laplace(model).fit(batches)
    assert list(order) == list("abc") and model.fixed["two"]["three"] == {"four": 4}
