"""Graphs through the posterior: graph and node labels, one graph alone, graphs of one node."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import UnsupportedUse

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, global_mean_pool

CLASSES, FEATURES, IGNORED = 3, 4, -100
SIZES = (4, 3, 5, 1, 4, 3, 6)
PARTS = (slice(0, 3), slice(3, 6), slice(6, 7))


class GCN(nn.Module):
    """A graph convolution, a linear layer over nodes, and a head over nodes or over graphs."""

    def __init__(self, pool: bool):
        super().__init__()
        self.pool = pool
        self.conv = GCNConv(FEATURES, 5)
        self.lin = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        h = self.lin(self.conv(x, edge_index).tanh()).tanh()
        if self.pool:
            h = global_mean_pool(
                h, x.new_zeros(len(x), dtype=torch.long) if batch is None else batch
            )
        return self.head(h)


def graph(nodes: int, labels: str) -> Data:
    """A ring with labels of the graph, of every node, or of every second node."""
    index = torch.arange(nodes)
    ring = torch.stack([index, (index + 1) % nodes])
    edges = torch.cat([ring, ring.flip(0)], 1).unique(dim=1)
    y = torch.randint(0, CLASSES, (1,) if labels == "graph" else (nodes,))
    if labels == "masked":
        y[1::2] = IGNORED
    x = torch.randn(nodes, FEATURES, dtype=torch.float64)
    return Data(x=x, edge_index=edges[:, edges[0] != edges[1]], y=y)


def task(labels: str, sizes: tuple[int, ...] = SIZES) -> tuple[GCN, list[Batch]]:
    """A seeded model and batches of graphs."""
    torch.manual_seed(6)
    model = GCN(pool=labels == "graph").double()
    graphs = [graph(nodes, labels) for nodes in sizes]
    return model, [Batch.from_data_list(graphs[part]) for part in PARTS if graphs[part]]


def run(model: nn.Module, data: Data) -> Tensor:
    return model(data.x, data.edge_index, data.batch)


def mapping(data: Data) -> dict[str, Tensor]:
    """The same graphs for a model called by keyword."""
    return {"x": data.x, "edge_index": data.edge_index, "batch": data.batch, "labels": data.y}


def fit(model: nn.Module, batches: list[Any], **options: Any) -> Laplace:
    return Laplace(model, "classification", forward_fn=run, **options).fit(batches)


labelled = pytest.mark.parametrize("labels", ["graph", "node", "masked"])
on_nodes = pytest.mark.parametrize("labels", ["node", "masked"])


@labelled
def test_every_verb(labels):
    model, batches = task(labels)
    la = fit(model, batches)
    assert la.n_data == len(SIZES)
    before = float(la.log_marginal_likelihood())
    assert float(la.optimize_prior().log_marginal_likelihood()) > before
    assert float(la.calibrate(batches, "validation").posterior_scale) >= 0
    la.posterior_scale = 1.0
    la.optimize_prior("gridsearch", val_loader=batches, grid=(0.5, 2.0))
    assert set(la.prior_precision.tolist()) <= {0.5, 2.0}
    rows = len(batches[0].y)
    for options in ({}, {"link_approx": "mc"}, {"link_approx": "bridge"}):
        assert_probabilities(la(batches[0], **options), rows)
    for pred_type in ("linear", "nn"):
        assert_probabilities(la(batches[0], pred_type=pred_type, n_samples=3), rows)
    predictive = la.predict(batches[0])
    assert predictive.covariance.shape == (rows, CLASSES, CLASSES)
    assert predictive.entropy.shape == predictive.epistemic.shape == (rows,)
    assert la.functional_samples(batches[0], 2).shape == (2, rows, CLASSES)
    assert la.predictive_samples(batches[0], 2).shape == (2, rows, CLASSES)


def assert_probabilities(probs: Tensor, rows: int) -> None:
    assert probs.shape == (rows, CLASSES)
    torch.testing.assert_close(probs.sum(-1), torch.ones(rows).double())


@labelled
def test_mappings_are_the_same_graphs(labels):
    model, batches = task(labels)
    want = fit(model, batches)
    got = Laplace(model, "classification").fit([mapping(batch) for batch in batches])
    assert torch.equal(got.log_marginal_likelihood(), want.log_marginal_likelihood())
    assert torch.equal(got(mapping(batches[1])), want(batches[1]))


@labelled
def test_nodes_may_lie_in_any_order(labels):
    """The batch vector says whose they are; PyTorch Geometric only happens to sort them."""
    model, batches = task(labels)
    want = fit(model, batches[:1], hessian_structure="full")
    data = mapping(batches[0])
    order = torch.randperm(len(data["x"]))
    moved = {"x": data["x"][order], "edge_index": order.argsort()[data["edge_index"]]}
    moved["batch"] = data["batch"][order]
    moved["labels"] = data["labels"] if labels == "graph" else data["labels"][order]
    got = Laplace(model, "classification", hessian_structure="full").fit([moved])
    torch.testing.assert_close(
        got.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=1e-11, atol=0
    )


@labelled
@pytest.mark.parametrize("make", [lambda g: g, mapping], ids=["data", "mapping"])
def test_one_graph_alone(labels, make):
    """One example; with node labels the usual transductive task."""
    torch.manual_seed(6)
    model, alone = GCN(pool=labels == "graph").double(), graph(9, labels)
    batch = {k: v for k, v in make(alone).items() if v is not None} if make is mapping else alone
    options = {} if make is mapping else {"forward_fn": run}
    for structure in ("diag", "full"):
        la = Laplace(model, "classification", hessian_structure=structure, **options)
        la.fit([batch])
        assert la.n_data == 1
        exact = exact_ggn(model, alone)
        got = la.curvature.blocks["full"].dense() if structure == "full" else None
        if got is None:
            exact = exact.diagonal()
            got = torch.cat([b.dense().diagonal() for b in la.curvature.blocks.values()])
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-12)
    assert len(la(batch)) == len(alone.y)


def exact_ggn(model: nn.Module, data: Data) -> Tensor:
    """The GGN of the labelled rows, by the dense oracle."""
    kept = data.y != IGNORED

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: Tensor) -> Tensor:
            return self.model(data.x, data.edge_index)[rows]

    rows = torch.arange(len(data.y))[kept]
    return oracles.ggn(Fixed(), rows, data.y[kept], "classification")


@pytest.mark.parametrize("labels", ["graph", "node"])
def test_graphs_of_one_node_are_plain_examples(labels):
    """Without neighbours a graph convolution is a linear layer and a mean is its only element."""
    model, batches = task(labels, sizes=(1,) * 7)
    plain = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), model.lin, nn.Tanh(), model.head)
    plain = plain.double()
    plain[0].weight, plain[0].bias = model.conv.lin.weight, model.conv.bias
    pairs = [(batch.x, batch.y) for batch in batches]
    for structure in ("diag", "full"):
        got = fit(model, batches, hessian_structure=structure, prior_structure="scalar")
        want = Laplace(
            plain, "classification", hessian_structure=structure, prior_structure="scalar"
        ).fit(pairs)
        torch.testing.assert_close(got.log_marginal_likelihood(), want.log_marginal_likelihood())
        torch.testing.assert_close(got(batches[0]), want(pairs[0][0]))
        assert got.calibrate().posterior_scale == pytest.approx(
            float(want.calibrate().posterior_scale), rel=1e-6
        )


@on_nodes
def test_leaving_out_single_nodes_is_refused(labels):
    model, batches = task(labels)
    la = fit(model, batches)
    before = la(batches[0])
    with pytest.raises(UnsupportedUse, match="(?s)node.*method='validation'"):
        la.calibrate()
    assert torch.equal(la(batches[0]), before)


@labelled
@pytest.mark.parametrize("make", [lambda g: g, mapping], ids=["data", "mapping"])
def test_the_tuners_loss_is_the_negative_log_joint(labels, make):
    """Divided by the number of examples: what it weighs the prior with is the caller's count."""
    model, batches = task(labels)
    whole = Batch.from_data_list([g for batch in batches for g in batch.to_data_list()])
    functions: dict[str, Callable] = {} if make is mapping else {"forward_fn": run}
    options = {"prior_precision": 0.7, **functions}
    la = Laplace(model, "classification", **options).fit([make(whole)])
    tuner = MarglikTuner(model, "classification", len(whole.y), **options)
    loss = tuner.loss(*tuner.forward(make(whole)))
    joint = -la.log_likelihood + la.scatter / 2
    torch.testing.assert_close(len(whole.y) * loss.double(), joint)


@pytest.mark.slow
@labelled
def test_marglik_training(labels, caplog):
    """Trains on what it counted: no complaint about the number of examples."""
    model, batches = task(labels)
    with caplog.at_level(logging.WARNING, logger="kfac_laplace"):
        la, _, margliks, losses = marglik_training(
            model, batches, n_epochs=8, optimizer_kwargs={"lr": 0.05}, forward_fn=run
        )
    assert losses[-1] < losses[0] and len(margliks) == 8
    assert la.n_data == len(SIZES)
    assert "promised" not in caplog.text


@labelled
def test_a_saved_posterior_of_graphs_takes_more(labels, tmp_path):
    """Which rows are nodes is kept with the blocks, in plain data."""
    model, batches = task(labels)
    fit(model, batches[:1]).save(tmp_path / "first.pt")
    loaded = Laplace.load(tmp_path / "first.pt", model, forward_fn=run)
    loaded.fit(batches[1:], override=False)
    whole = fit(model, batches)
    assert loaded.n_data == whole.n_data
    for name, block in whole.curvature.blocks.items():
        torch.testing.assert_close(
            loaded.curvature.blocks[name].dense(), block.dense(), rtol=1e-12, atol=1e-14
        )
