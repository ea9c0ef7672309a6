"""Tiny graph networks of PyTorch Geometric, for graph and for node labels.

What the loader yields is a `Batch` of graphs of different sizes: node features `x` and the labels
lie one graph after another, `edge_index` is shifted to match, and `batch` names each node's graph.
The model receives the parts that it needs through `forward_fn`, the labels come by `batch_fn`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.case import IGNORED, ZooCase, lively, zoo_case

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATConv, GCNConv, GINConv, global_add_pool, global_mean_pool

CLASSES = 3
FEATURES = 4
SIZES = (4, 3, 5, 3, 4, 3, 6)  # nodes of each graph; a ring gives each two neighbours


def graphs(labels: str) -> list[Data]:
    """Connected random graphs with node features, edge features and labels."""
    found = []
    for nodes in SIZES:
        ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
        chords = torch.randint(0, nodes, (2, nodes // 2))
        one_way = torch.cat([ring, chords[:, chords[0] != chords[1]]], 1)
        edges = torch.cat([one_way, one_way.flip(0)], 1).unique(dim=1)
        y = torch.randint(0, CLASSES, (1,) if labels == "graph" else (nodes,))
        if labels == "masked":
            y[1::2] = IGNORED  # half of the nodes are unlabelled
        found.append(
            Data(
                x=torch.randn(nodes, FEATURES, dtype=torch.float64),
                edge_index=edges,
                edge_attr=torch.randn(edges.shape[1], 2, dtype=torch.float64),
                y=y,
            )
        )
    return found


def with_labels(batch: Data) -> tuple[Data, Tensor]:
    """The graphs and their labels."""
    return batch, batch.y


def run(model: nn.Module, data: Data) -> Tensor:
    """The model on the parts of the graphs that it needs."""
    return model(data.x, data.edge_index, data.batch)


def run_with_edges(model: nn.Module, data: Data) -> Tensor:
    """The same with edge features."""
    return model(data.x, data.edge_index, data.edge_attr, data.batch)


def _graph_case(
    name: str,
    model: nn.Module,
    labels: str,
    treatment: dict[str, str],
    *,
    forward: Callable[..., Tensor] = run,
    **options: Any,
) -> ZooCase:
    return ZooCase(
        name,
        lively(model),
        "classification",
        graphs(labels),
        treatment,
        collate=Batch.from_data_list,
        pair=with_labels,
        options={"forward_fn": forward, "batch_fn": with_labels},
        **{"rows": {"head": "batch" if labels == "graph" else "nodes", "*": "nodes"}, **options},
    )


class GCN(nn.Module):
    """Two graph convolutions, and for graph labels a mean over the nodes."""

    def __init__(self, pool: bool):
        super().__init__()
        self.pool = pool
        self.first = GCNConv(FEATURES, 5)
        self.second = GCNConv(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None) -> Tensor:
        h = self.first(x, edge_index).tanh()
        h = self.second(h, edge_index).tanh()
        return self.head(global_mean_pool(h, batch) if self.pool else h)


# The bias of a graph convolution is added after the messages, apart from its weight.
GCN_TREATMENT = {"first.bias": "diag", "second.bias": "diag", "*": "kron"}


@zoo_case
def gcn_graph(name: str) -> ZooCase:
    notes = "mean pooling over graphs of different sizes"
    return _graph_case(name, GCN(True), "graph", GCN_TREATMENT, notes=notes)


@zoo_case
def gcn_node(name: str) -> ZooCase:
    notes = "node outputs: (nodes, classes) for several graphs"
    return _graph_case(name, GCN(False), "node", GCN_TREATMENT, notes=notes)


class GIN(nn.Module):
    """Two isomorphism layers with an MLP each, sum pooling."""

    def __init__(self, pool: bool):
        super().__init__()
        self.pool = pool
        first = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4))
        second = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())
        self.first = GINConv(first, train_eps=True)
        self.second = GINConv(second, train_eps=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None) -> Tensor:
        h = self.first(x, edge_index).tanh()
        h = self.second(h, edge_index)
        return self.head(global_add_pool(h, batch) if self.pool else h)


GIN_TREATMENT = {"*.eps": "diag", "second.nn.1.*": "dense", "*": "kron"}


@zoo_case
def gin_graph(name: str) -> ZooCase:
    notes = "sum pooling, trained epsilon, a norm over nodes"
    return _graph_case(name, GIN(True), "graph", GIN_TREATMENT, notes=notes)


@zoo_case
def gin_node(name: str) -> ZooCase:
    notes = "node outputs of which half are unlabelled"
    return _graph_case(name, GIN(False), "masked", GIN_TREATMENT, notes=notes)


class GATNode(nn.Module):
    """Two attention layers with self-loops and two heads."""

    def __init__(self):
        super().__init__()
        self.first = GATConv(FEATURES, 3, heads=2)
        self.second = GATConv(6, CLASSES, heads=1)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None) -> Tensor:
        return self.second(self.first(x, edge_index).tanh(), edge_index)


class GATGraph(nn.Module):
    """Attention that sees edge features, mean pooling."""

    def __init__(self):
        super().__init__()
        self.first = GATConv(FEATURES, 3, heads=2, edge_dim=2, add_self_loops=False)
        self.second = GATConv(6, 4, heads=2, concat=False, edge_dim=2, add_self_loops=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor | None
    ) -> Tensor:
        h = self.first(x, edge_index, edge_attr).tanh()
        h = self.second(h, edge_index, edge_attr).tanh()
        return self.head(global_mean_pool(h, batch))


GAT_TREATMENT = {"*.att_*": "diag", "head.bias": "kron", "*.bias": "diag", "*": "kron"}


@zoo_case
def gat_node(name: str) -> ZooCase:
    notes = "node outputs straight from a graph layer, half of them unlabelled"
    return _graph_case(name, GATNode(), "masked", GAT_TREATMENT, notes=notes)


@zoo_case
def gat_graph(name: str) -> ZooCase:
    return _graph_case(
        name,
        GATGraph(),
        "graph",
        GAT_TREATMENT,
        forward=run_with_edges,
        rows={"head": "batch", "*lin_edge": "edges", "*": "nodes"},
        notes="a linear layer over edges",
    )
