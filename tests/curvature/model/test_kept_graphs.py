"""No graph of ours is left in what modules keep, and what they keep is theirs."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from laws import EXACT, relative_error
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import UnsupportedUse

Pair = namedtuple("Pair", "last count")


@dataclass
class State:
    h: Tensor | None = None


class Plain:
    """An object of a class of the user's own."""

    def __init__(self) -> None:
        self.states = [State()]


class Keeps(nn.Module):
    """Two layers; a function keeps the hidden values."""

    def __init__(self, keep: Callable[[Keeps, Tensor], None]):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.last: Any = None
        self.keep = keep
        self.register_buffer("buffer", torch.zeros(4))
        self.named: dict[str, Any] = OrderedDict()
        self.all, self.recent, self.pair, self.both = [], deque(maxlen=2), Pair(None, 0), set()
        self.space, self.state, self.plain = SimpleNamespace(h=None), State(), Plain()
        self.outside = [nn.Linear(1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.keep(self, h)
        return self.head(h)


def in_place(m: Keeps, h: Tensor) -> None:
    m.buffer = m.buffer.clone()
    m.buffer[0] = h.mean()


def into_the_buffer(m: Keeps, h: Tensor) -> None:
    m.buffer.mul_(0.5).add_(h.mean(0))


def filled_once(m: Keeps, h: Tensor) -> None:
    """A cache and its flag: the one without the other would be an error."""
    if m.last is not True:
        m.named["bias"], m.last = m.a.bias.exp(), True
    assert m.named["bias"].shape == (4,)


KEEPERS: dict[str, Callable[[Keeps, Tensor], None]] = {
    "attribute": lambda m, h: setattr(m, "last", h),
    "new attribute": lambda m, h: setattr(m, "fresh", h),
    "view": lambda m, h: setattr(m, "last", h[:, 1:]),
    "scalar": lambda m, h: setattr(m, "last", h.square().mean()),
    "list": lambda m, h: m.all.append(h),
    "list of lists": lambda m, h: m.all.append([(h, {"deep": [h]})]),
    "mapping": lambda m, h: m.named.__setitem__("h", h),
    "tuple": lambda m, h: setattr(m, "last", (h, 1)),
    "named tuple": lambda m, h: setattr(m, "pair", Pair(h, m.pair.count + 1)),
    "deque": lambda m, h: m.recent.append(h),
    "set": lambda m, h: m.both.add(h),
    "namespace": lambda m, h: setattr(m.space, "h", h),
    "dataclass": lambda m, h: setattr(m.state, "h", h),
    "objects": lambda m, h: setattr(m.plain.states[0], "h", h),
    "buffer": lambda m, h: setattr(m, "buffer", 0.9 * m.buffer + 0.1 * h.mean(0)),
    "buffer in place": in_place,
    "into the buffer": into_the_buffer,
    "parameters": lambda m, h: setattr(m, "last", m.a.weight.t()),
    "a parameter itself": lambda m, h: m.named.__setitem__("w", m.a.weight),
    "in a child": lambda m, h: setattr(m.head, "seen", h),
    "in a module outside": lambda m, h: setattr(m.outside[0], "seen", [h]),
    "filled once": filled_once,
}


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def kept(model: nn.Module) -> Iterator[Tensor]:
    """All tensors in a model, by pickle's own walk."""
    found: list[Tensor] = []

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                found.append(value)
            return "tensor" if isinstance(value, Tensor) or callable(value) else None

    class Nowhere:
        def write(self, _: bytes) -> None:
            pass

    for module in model.modules():
        state = {k: v for k, v in vars(module).items() if k not in ("_modules", "keep")}
        Pickler(Nowhere()).dump(state)
    yield from found


def assert_free(model: nn.Module) -> None:
    """The model can be copied, and all tensors in it be used."""
    copy.deepcopy({k: v for k, v in vars(model).items() if k != "keep"})
    for tensor in kept(model):
        if not isinstance(tensor, nn.Parameter):
            assert tensor.grad_fn is None and not tensor.requires_grad
            assert bool(torch.isfinite(tensor + 0).all())


def tuned(model: nn.Module, batches: list) -> None:
    tuner = MarglikTuner(model, "classification", 8)
    tuner.step(batches)
    copy.deepcopy(tuner.laplace(batches))


CALLS: dict[str, Callable[[nn.Module, list], Any]] = {
    "fit": lambda m, b: copy.deepcopy(Laplace(m).fit(b)),
    "mc": lambda m, b: Curvature(m, "classification", fisher="mc").fit(b),
    "full": lambda m, b: Laplace(m, hessian_structure="full").fit(b),
    "glm": lambda m, b: Laplace(m).fit(b)(b[0][0]),
    "linear": lambda m, b: Laplace(m).fit(b)(b[0][0], pred_type="linear", n_samples=2),
    "nn": lambda m, b: Laplace(m).fit(b)(b[0][0], pred_type="nn", n_samples=2),
    "functions": lambda m, b: Laplace(m).fit(b).functional_samples(b[0][0], 2),
    "loo": lambda m, b: Laplace(m).fit(b).calibrate(),
    "validation": lambda m, b: Laplace(m).fit(b).calibrate(b, method="validation"),
    "tuner": tuned,
    "training": lambda m, b: marglik_training(m, b, n_epochs=2),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", [call for call in CALLS if call != "training"])
@pytest.mark.parametrize("name", ["attribute", "list", "buffer"])
def test_every_call_leaves_a_model_that_can_be_copied(name, call, mode):
    torch.manual_seed(0)
    model = Keeps(KEEPERS[name]).double()
    with mode():
        CALLS[call](model, data())
    assert_free(model)


#: Others hand a batch the graph of the one before, which is gone.
TRAINABLE = KEEPERS.keys() - {"buffer", "buffer in place", "into the buffer", "filled once"}
PAIRS = [
    *((name, call) for name in KEEPERS for call in ("fit", "glm", "linear")),
    *((name, "training") for name in KEEPERS if name in TRAINABLE),
]
PAIRS.remove(("into the buffer", "linear"))


@pytest.mark.parametrize(("name", "call"), PAIRS)
def test_whatever_a_module_keeps_can_be_copied(name, call):
    torch.manual_seed(0)
    model = Keeps(KEEPERS[name]).double()
    CALLS[call](model, data())
    assert_free(model)


def test_a_model_that_writes_into_its_buffers_has_no_linearised_samples():
    model, batches = Keeps(KEEPERS["into the buffer"]).double(), data()
    with pytest.raises(UnsupportedUse, match="pred_type.*captured Tensor.*'nn'"):
        CALLS["linear"](model, batches)
    assert_free(model)


@pytest.mark.parametrize("name", KEEPERS)
def test_what_is_kept_does_not_change_the_curvature(name):
    """Batches after the first are as exact as it is, also where a cache is never emptied."""
    torch.manual_seed(0)
    model, batches = Keeps(KEEPERS[name]).double(), data()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    block = Curvature(model, "classification", hessian_structure="full").fit(batches).blocks["full"]
    plain = nn.Sequential(OrderedDict(a=model.a, tanh=nn.Tanh(), head=model.head))
    exact = oracles.ggn(plain, x, y, "classification", list(block.params))
    assert relative_error(block.dense(), exact) < EXACT


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["attribute", "list", "mapping", "namespace", "buffer"])
def test_what_the_caller_had_kept_is_there_again(name, gradients):
    """A loss of the last activations can still be taken back, through the caller's own graph."""
    torch.manual_seed(0)
    model, batches = Keeps(KEEPERS[name]).double(), data()
    with torch.set_grad_enabled(gradients):
        model(batches[0][0])
    before = [t for t in kept(model) if not isinstance(t, nn.Parameter)]
    Laplace(model).fit(batches)(batches[1][0])
    after = [t for t in kept(model) if not isinstance(t, nn.Parameter)]
    assert [id(t) for t in after] == [id(t) for t in before]
    if gradients:
        (held,) = [t for t in after if t.grad_fn is not None]
        held.sum().backward()
        assert model.a.weight.grad is not None


def test_after_an_exception():
    torch.manual_seed(0)
    model, batches = Keeps(KEEPERS["attribute"]).double(), data()
    curvature = Curvature(model, "classification")
    with pytest.raises(ValueError, match="class"):
        curvature.accumulate(batches[0][0], batches[0][1] + 5)
    assert model.last is None
    model.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("no")))
    with pytest.raises(KeyError):
        curvature.accumulate(*batches[0])
    assert model.last is None
    copy.deepcopy(vars(model)["named"])


def test_modules_that_keep_no_graph_stay_as_the_pass_leaves_them():
    """Values without a graph, and counts."""

    def count(m: Keeps, h: Tensor) -> None:
        m.last = (m.last or 0) + 1
        m.named["h"] = h.detach()

    model, batches = Keeps(count).double(), data()
    Laplace(model).fit(batches)
    assert model.last == 2 and model.named["h"].shape == (3, 4)


class Compares(nn.Module):
    """Caches a function of a weight by the weight's identity."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.key, self.value = nn.Linear(3, 2), None, None
        self.made = []

    def forward(self, x: Tensor) -> Tensor:
        if self.key is not self.lin.weight:
            self.key, self.value = self.lin.weight, self.lin.weight.t().contiguous()
            self.made.append(0)
        return x @ self.value + self.lin.bias


def test_caches_by_identity_stay_right():
    torch.manual_seed(0)
    model, batches = Compares().double(), data()
    x = batches[0][0]
    with torch.no_grad():
        want = model(x)
    la = Laplace(model).fit(batches)
    for pred_type in ("glm", "linear", "nn"):
        la(x, pred_type=pred_type, n_samples=2)
        with torch.no_grad():
            assert torch.equal(model(x), want)
            assert model.key is model.lin.weight


def test_cycles_and_large_lists_are_no_trouble():
    torch.manual_seed(0)
    model, batches = Keeps(KEEPERS["attribute"]).double(), data()
    model.all.append(model.all)
    model.named["parent"] = [model]
    model.numbers = list(range(10**6))
    model.outside[0].parent = [model]
    Laplace(model).fit(batches)
    assert model.last is None and model.all[0] is model.all
