"""One check a fit: outputs repeat under other random states, and an example alone gives its row."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import UnsupportedUse

RANDOM = "the forward pass is random in evaluation mode"
MIXED = "an example alone gives another output than in its batch"
N = 8


class Net(nn.Module):
    """Linear, a step between, linear. The step sees the module, inputs and features (n, 6)."""

    def __init__(self, step: Callable[[Net, Tensor, Tensor], Tensor]):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(3, 6), nn.Linear(6, 2), step
        self.generator = torch.Generator().manual_seed(3)
        self.calls = 0
        self.register_buffer("running", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.step(self, x, self.first(x).tanh()))


def own_mean(net: Net, x: Tensor, h: Tensor) -> Tensor:
    """A running mean that evaluation mode updates."""
    net.running = 0.5 * net.running + 0.5 * h.detach().mean(0)
    return h - net.running


def gumbel(net: Net, x: Tensor, h: Tensor) -> Tensor:
    return F.gumbel_softmax(h, hard=True)


def coin(share: float) -> Callable:
    """Stochastic depth: one coin for the whole batch."""
    return lambda net, x, h: h if torch.rand(()) < share else 0 * h


def sampled(net: Net, x: Tensor, h: Tensor) -> Tensor:
    return h * F.one_hot(torch.multinomial(h.softmax(-1), 1)[:, 0], 6)


RANDOM_STEPS: dict[str, Callable] = {
    "dropout": lambda net, x, h: F.dropout(h, 0.5),
    "rare dropout": lambda net, x, h: F.dropout(h, 1e-6),
    "dropout of inputs": lambda net, x, h: net.first(F.dropout(x, 0.2)).tanh(),
    "alpha dropout": lambda net, x, h: F.alpha_dropout(h, 0.1, training=True),
    "channel dropout": lambda net, x, h: F.dropout1d(h[:, :, None], 0.3)[:, :, 0],
    "attention dropout": lambda net, x, h: F.scaled_dot_product_attention(
        h.view(-1, 2, 3), h.view(-1, 2, 3), h.view(-1, 2, 3), dropout_p=0.2
    ).reshape(-1, 6),
    "leaky units of random slope": lambda net, x, h: F.rrelu(h, training=True),
    "noise": lambda net, x, h: h + 0.1 * torch.randn_like(h),
    "little noise": lambda net, x, h: h + 1e-3 * torch.rand_like(h),
    "noise without gradient": lambda net, x, h: h + torch.empty_like(h).normal_().detach(),
    "stochastic depth": coin(0.5),
    "rare depth": coin(1 - 1e-4),
    "depth that is rare": coin(1e-4),
    "bernoulli gates": lambda net, x, h: h * torch.bernoulli(torch.full_like(h, 0.9999)),
    "gumbel": gumbel,
    "multinomial": sampled,
    "permutation": lambda net, x, h: h[:, torch.randperm(6)],
    "numpy": lambda net, x, h: h * float(np.random.uniform(0.5, 1)),
    "python": lambda net, x, h: h * random.uniform(0.5, 1),
    "python's shuffle": lambda net, x, h: h[:, random.sample(range(6), 6)],
    "a generator of its own": lambda net, x, h: (
        h + torch.randn(h.shape, generator=net.generator, dtype=h.dtype)
    ),
    "numpy's new generator": lambda net, x, h: h * float(np.random.default_rng().uniform(0.5, 1)),
    "a counter": lambda net, x, h: h + 0.01 * net.calls,
    "a running mean": own_mean,
}


@torch.no_grad()
def standardised(net: Net, x: Tensor, h: Tensor) -> Tensor:
    """Scale and shift by statistics of the batch, as numbers."""
    return h.mean(0), h.std(0, correction=0)


def crowd(net: Net, x: Tensor, h: Tensor) -> Tensor:
    """Attention over the batch axis, of which autograd sees the values alone."""
    return h + ((h @ h.mT).softmax(-1) @ h).detach()


MIXING_STEPS: dict[str, Callable] = {
    "mean": lambda net, x, h: h - h.mean(0),
    "detached mean": lambda net, x, h: h - h.mean(0).detach(),
    "mean input": lambda net, x, h: h + x.mean(),
    "statistics": lambda net, x, h: (h - standardised(net, x, h)[0]) / standardised(net, x, h)[1],
    "deviation of one": lambda net, x, h: h / (h.detach().std(0) + 1),
    "largest": lambda net, x, h: h / h.detach().abs().max(),
    "largest by unit": lambda net, x, h: h - h.detach().amax(0),
    "longest": lambda net, x, h: h / x.norm(dim=-1).max(),
    "sorted": lambda net, x, h: h[x[:, 0].argsort()],
    "sorted units": lambda net, x, h: h.sort(0).values,
    "turned round": lambda net, x, h: h.flip(0),
    "sums before": lambda net, x, h: h + h.detach().cumsum(0),
    "the one before": lambda net, x, h: h + F.pad(h.detach()[:-1], (0, 0, 1, 0)),
    "neighbour": lambda net, x, h: h + h.roll(1, 0).detach(),
    "the first": lambda net, x, h: h - h[:1].detach(),
    "attention": crowd,
    "similarities": lambda net, x, h: h + (h @ h.mT).detach().mean(1, keepdim=True),
    "softmax over examples": lambda net, x, h: h * h.detach().softmax(0),
    "norm over examples": lambda net, x, h: h / h.detach().norm(dim=0),
    "their number": lambda net, x, h: h / len(h),
    "their index": lambda net, x, h: h + 0.1 * torch.arange(len(h))[:, None],
    "same noise for each place": lambda net, x, h: (
        h + torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=h.dtype)
    ),
    "statistics now and then": lambda net, x, h: h - h.mean(0).detach() if len(h) > 4 else h,
}


def data(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3).to(dtype), torch.randint(0, 2, (n,))


def made(step: Callable, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    return Net(step).to(dtype)


FAULTY = {
    **{name: (step, RANDOM) for name, step in RANDOM_STEPS.items()},
    **{name: (step, MIXED) for name, step in MIXING_STEPS.items()},
}
faulty = pytest.mark.parametrize("name", FAULTY)


@faulty
def test_refused_with_the_reason(name):
    step, reason = FAULTY[name]
    curvature = Curvature(made(step), "classification")
    with pytest.raises(UnsupportedUse, match=reason):
        curvature.fit([data()])
    assert not curvature.blocks and curvature.n_data == 0


@pytest.mark.parametrize("name", ["dropout", "a generator of its own", "detached mean", "largest"])
@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("likelihood", ["regression", "binary", "classification"])
def test_in_every_structure_and_likelihood(name, structure, likelihood):
    step, reason = FAULTY[name]
    x, y = data()
    y = y if likelihood == "classification" else torch.stack([y, 1 - y], 1).double()
    with pytest.raises(UnsupportedUse, match=reason):
        Laplace(made(step), likelihood, hessian_structure=structure).fit([(x, y)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dropout", "noise", "gumbel", "mean", "their number", "sorted"])
def test_in_every_precision(name, dtype):
    step, reason = FAULTY[name]
    with pytest.raises(UnsupportedUse, match=reason):
        Curvature(made(step, dtype), "classification").fit([data(dtype)])


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["dropout", "rare dropout", "numpy", "a counter", "detached mean"])
def test_in_small_batches(name, n):
    step, reason = FAULTY[name]
    with pytest.raises(UnsupportedUse, match=reason):
        Curvature(made(step), "classification").fit([data(n=n)])


@pytest.mark.parametrize("name", RANDOM_STEPS)
def test_one_example_shows_randomness(name):
    with pytest.raises(UnsupportedUse, match=RANDOM):
        Curvature(made(RANDOM_STEPS[name]), "classification").fit([data(n=1)])


def test_one_example_does_not_show_mixing_but_the_next_batch_does():
    (x, y), curvature = data(), Curvature(made(MIXING_STEPS["detached mean"]), "classification")
    curvature.accumulate(x[:1], y[:1])
    with pytest.raises(UnsupportedUse, match=MIXED):
        curvature.accumulate(x, y)
    assert curvature.n_data == 1


def test_outputs_of_a_small_size_are_compared_by_their_size():
    """Float32: half the digits of one would be a third of these outputs."""
    model = made(RANDOM_STEPS["dropout"], torch.float32)
    with torch.no_grad():
        for parameter in model.last.parameters():
            parameter.mul_(1e-3)
    with pytest.raises(UnsupportedUse, match=RANDOM):
        Curvature(model, "classification").fit([data(torch.float32)])


def tuner_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    MarglikTuner(model, "classification", n_data=N).step([batch])


def again(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """A second fit, which remembers the first one's layouts."""
    step, model.step = model.step, lambda net, x, h: h
    la = Laplace(model).fit([batch])
    model.step = step
    la.fit([batch])


ENTRIES: dict[str, Callable] = {
    "fit": lambda model, batch: Laplace(model).fit([batch]),
    "a second fit": again,
    "accumulate": lambda model, batch: Curvature(model, "classification").accumulate(*batch),
    "prepare": lambda model, batch: MarglikTuner(model, "classification", n_data=N).prepare(
        [batch]
    ),
    "step": tuner_step,
    "training": lambda model, batch: marglik_training(model, [batch], n_epochs=1),
    "at other weights": lambda model, batch: Curvature(model, "classification").accumulate(
        *batch, parameters={name: p.detach() / 2 for name, p in model.named_parameters()}
    ),
}


@pytest.mark.parametrize("name", ["dropout", "detached mean"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_from_every_entry(entry, name):
    step, reason = FAULTY[name]
    with pytest.raises(UnsupportedUse, match=reason):
        ENTRIES[entry](made(step), data())


def test_messages_say_what_was_seen_and_what_to_do():
    for name, words in {
        "dropout": ["between two random states", "training=self.training"],
        "rare dropout": ["depend on low draws", "training=self.training"],
        "rare depth": ["depend on high draws", "training=self.training"],
        "a counter": ["call to call", "same random state", "counts"],
        "mean": ["difference of", "alone in evaluation mode", "leading axis of 1"],
    }.items():
        with pytest.raises(UnsupportedUse) as caught:
            Curvature(made(FAULTY[name][0]), "classification").fit([data()])
        assert all(word in str(caught.value) for word in words), str(caught.value)


# --- graphs ---------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Sums over neighbours, a step, and a row for each node, or for each graph."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], by_node: bool):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(3, 6), nn.Linear(6, 2), step
        self.by_node = by_node

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = self.step(h.index_add(0, edge_index[1], h[edge_index[0]]), batch)
        if not self.by_node:
            graphs = int(batch.max()) + 1
            h = torch.zeros(graphs, 6, dtype=h.dtype).index_add(0, batch, h)
        return self.last(h)


def graphs() -> dict[str, Tensor]:
    """Four graphs of two nodes and an edge, as a mapping."""
    torch.manual_seed(0)
    nodes = torch.arange(8).reshape(4, 2)
    return {
        "x": torch.randn(8, 3).double(),
        "edge_index": torch.cat([nodes.mT, nodes.mT.flip(0)], 1),
        "batch": torch.arange(4).repeat_interleave(2),
    }


def run_graph(model: nn.Module, x: object) -> Tensor:
    return model(x.x, x.edge_index, x.batch)


GRAPH_STEPS: dict[str, tuple[Callable, str]] = {
    "plain": (lambda h, batch: h, ""),
    "dropout": (lambda h, batch: F.dropout(h, 0.3), RANDOM),
    "rare dropout": (lambda h, batch: F.dropout(h, 1e-6), RANDOM),
    "mean over all nodes": (lambda h, batch: h - h.mean(0).detach(), MIXED),
    "number of nodes": (lambda h, batch: h / len(h), MIXED),
}


@pytest.mark.parametrize("form", ["mapping", "data"])
@pytest.mark.parametrize("by_node", [False, True])
@pytest.mark.parametrize("name", GRAPH_STEPS)
def test_graphs(name, by_node, form):
    """A mapping cannot be divided: there randomness alone shows."""
    step, reason = GRAPH_STEPS[name]
    torch.manual_seed(0)
    model, x, options = Graph(step, by_node).double(), graphs(), {}
    y = torch.arange(8 if by_node else 4) % 2
    if form == "data":
        data_module = pytest.importorskip("torch_geometric.data")
        parts = [
            data_module.Data(x=x["x"][2 * k : 2 * k + 2], edge_index=torch.tensor([[0, 1], [1, 0]]))
            for k in range(4)
        ]
        x, options = data_module.Batch.from_data_list(parts), {"forward_fn": run_graph}
    curvature = Curvature(model, "classification", **options)
    if not reason or (form == "mapping" and reason == MIXED):
        assert curvature.fit([(x, y)]).n_data == 4
        return
    with pytest.raises(UnsupportedUse, match=reason):
        curvature.fit([(x, y)])
