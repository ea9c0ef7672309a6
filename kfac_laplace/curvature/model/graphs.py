"""Batches of graphs: nodes and edges in long tables, and a vector that says whose they are."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.model.unchanged import outside_inference
from kfac_laplace.errors import UnsupportedUse


def is_graph(x: Any) -> bool:
    """Whether inputs are graphs: PyTorch Geometric's data, or a mapping with an `edge_index`."""
    if isinstance(x, Mapping):
        return isinstance(x.get("edge_index"), Tensor)
    return isinstance(getattr(x, "edge_index", None), Tensor)


class GraphBatch:
    """Graphs as the caller passed them, moved to the model's device; one graph is one example.

    Args:
        x: `Data` or `Batch` of PyTorch Geometric, or a mapping with `edge_index` (2, edges) and,
            for several graphs, `batch` (nodes,): the graph of each node.
        device: where to move the tensors.
    """

    #: Graphs say themselves how many they are, and have no inputs shared by all.
    certain = True
    shapes: Mapping[str, torch.Size] = {}

    def __init__(self, x: Any, device: torch.device):
        self._device = device
        if isinstance(x, Mapping):
            self.x: Any = {
                key: outside_inference(value).to(device) if isinstance(value, Tensor) else value
                for key, value in x.items()
            }
        else:
            self.x = copy.copy(x).to(device)
        edge_index, batch = self._get("edge_index"), self._get("batch")
        if batch is None:
            batch = edge_index.new_zeros(self._node_count(edge_index))
        graphs = getattr(x, "num_graphs", None)
        self.n = int(graphs) if graphs is not None else int(batch.max()) + 1 if len(batch) else 0
        self._nodes = batch.clone()  # ours: what is found of it is kept with it
        self._edges = batch[edge_index[0]]

    def _get(self, name: str) -> Any:
        return self.x.get(name) if isinstance(self.x, Mapping) else getattr(self.x, name, None)

    def _node_count(self, edge_index: Tensor) -> int:
        count = getattr(self.x, "num_nodes", None)
        if count is not None:
            return int(count)
        features = self._get("x")
        return len(features) if isinstance(features, Tensor) else int(edge_index.max()) + 1

    @property
    def divisible(self) -> bool:
        """Whether some of the graphs can be taken out: not where a mapping holds them."""
        return hasattr(self.x, "index_select")

    @property
    def segments(self) -> dict[str, Tensor]:
        """The graph of each node, of each edge, and of edges followed by a loop at every node."""
        both = torch.cat([self._edges, self._nodes])
        return {"nodes": self._nodes, "edges": self._edges, "edges and loops": both}

    @property
    def data(self) -> list[Tensor]:
        """The tensors that differ between examples: all."""
        values = self.x.values() if isinstance(self.x, Mapping) else self.x.to_dict().values()
        return [value for value in values if isinstance(value, Tensor)]

    def copied(self) -> "GraphBatch":
        """The same graphs in tensors of their own, as far as their type can be copied."""
        if isinstance(self.x, Mapping):
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.x.items()}
            return GraphBatch(own, self._device)
        return GraphBatch(self.x.clone(), self._device) if hasattr(self.x, "clone") else self

    def select(self, examples: Tensor) -> "GraphBatch":
        """The graphs of the given indices."""
        if self.n == 1 and examples.tolist() == [0]:
            return self
        if not self.divisible:
            raise UnsupportedUse(
                "a mapping of graphs cannot be divided",
                where="x",
                got=f"{self.n} graphs",
                remedy="Pass batches of torch_geometric.data.Batch",
            )
        chosen = self.x.index_select(examples.tolist())
        return GraphBatch(type(self.x).from_data_list(chosen), self._device)

    def split(self, step: int) -> "Iterator[GraphBatch]":
        """The batch in pieces of at most `step` graphs; a mapping stays whole."""
        if step >= self.n or not self.divisible:
            yield self
            return
        for indices in torch.arange(self.n, device="cpu").split(step):
            yield self.select(indices)
