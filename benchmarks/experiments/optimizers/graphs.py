"""Molecule-like graphs with classes of a random network, and a graph network that learns them.

Trees of nodes with at most four neighbours, a few of them closed to rings; six types of nodes,
three of edges. Generated, so that nothing is downloaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.experiments.networks import seeded
from benchmarks.experiments.optimizers.task import Data, Size

NODE_TYPES, EDGE_TYPES, CLASSES, NEIGHBOURS = 6, 3, 4, 4
#: Part of the nodes that try to close a ring.
RINGS = 0.25
Graph = Mapping[str, Tensor]


@dataclass(frozen=True)
class Graphs:
    """Graphs one after another in long tables, as `kfac_laplace` reads a mapping of graphs.

    Args:
        nodes: type of each node (nodes,).
        edges: both ends of each edge, in the numbers of all nodes, both directions (2, edges).
        kinds: type of each edge (edges,).
        sizes: nodes of each graph (n,).
        lengths: edges of each graph (n,).
        y: classes (n,).
    """

    nodes: Tensor
    edges: Tensor
    kinds: Tensor
    sizes: Tensor
    lengths: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    def pick(self, index: Tensor, draws: Generator | None = None) -> tuple[Graph, Tensor]:
        """Some graphs as one mapping, their nodes numbered anew, and their classes."""
        index = index.to(self.sizes.device)
        nodes, node_counts = _spans(self.sizes, index)
        edges, edge_counts = _spans(self.lengths, index)
        first_before = (self.sizes.cumsum(0) - self.sizes)[index]
        first_after = node_counts.cumsum(0) - node_counts
        shift = (first_after - first_before).repeat_interleave(edge_counts)
        graph = {
            "x": F.one_hot(self.nodes[nodes], NODE_TYPES).float(),
            "edge_index": self.edges[:, edges] + shift,
            "edge_attr": F.one_hot(self.kinds[edges], EDGE_TYPES).float(),
            "batch": torch.arange(len(index), device=index.device).repeat_interleave(node_counts),
        }
        return graph, self.y[index]


def _spans(counts: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Places of all rows that belong to some graphs, and how many belong to each."""
    picked = counts[index]
    starts = (counts.cumsum(0) - counts)[index]
    within = starts - (picked.cumsum(0) - picked)
    places = torch.arange(int(picked.sum()), device=counts.device)
    return places + within.repeat_interleave(picked), picked


class GraphNetwork(nn.Module):
    """Rounds of two MLPs: one on edges, summed at their targets, and one on nodes; mean of nodes.

    Args:
        width: of all hidden layers.
        rounds: how often nodes hear of each other.
        classes: outputs.
    """

    def __init__(self, width: int, rounds: int, classes: int = CLASSES):
        super().__init__()
        self.first = nn.Linear(NODE_TYPES, width)
        self.edges = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width + EDGE_TYPES, width), nn.ReLU())
            for _ in range(rounds)
        )
        self.nodes = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(rounds)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))
        self.head = nn.Linear(width, classes)

    def forward(self, graph: Graph) -> Tensor:
        """Graphs as a mapping to class scores (n, classes)."""
        (source, target), batch = graph["edge_index"], graph["batch"]
        h = self.first(graph["x"]).relu()
        for edge, node, norm in zip(self.edges, self.nodes, self.norms, strict=True):
            message = edge(torch.cat([h[source], h[target], graph["edge_attr"]], 1))
            heard = torch.zeros_like(h).index_add(0, target, message)
            h = norm(h + node(torch.cat([h, heard], 1)))
        counts = batch.bincount()
        means = h.new_zeros(len(counts), h.shape[1]).index_add(0, batch, h) / counts[:, None]
        return self.head(means)


def network(size: Size) -> nn.Module:
    """The network that learns."""
    return GraphNetwork(size.width, size.depth)


def data(size: Size, device: str, folder: object = None) -> Data:
    """Graphs of 8 to `side` nodes; classes by the medians of two outputs of a random network."""
    counts = (size.train, size.held_out, size.held_out)
    whole = _generated(sum(counts), size.side, seed=0)
    teacher = seeded(lambda: GraphNetwork(32, 3, classes=2), 0, "cpu")
    with torch.no_grad():
        parts = torch.arange(len(whole)).split(500)
        scores = torch.cat([teacher(whole.pick(index)[0]) for index in parts])
    above = scores > scores[: size.train].median(0).values
    found, start = [], 0
    for count in counts:
        index = torch.arange(start, start + count)
        found.append(_some(whole, index, (2 * above[:, 0] + above[:, 1])[index], device))
        start += count
    return Data(*found)


def _some(whole: Graphs, index: Tensor, y: Tensor, device: str) -> Graphs:
    """Some graphs with classes, on a device."""
    graph, _ = whole.pick(index)
    tables = graph["x"].argmax(1), graph["edge_index"], graph["edge_attr"].argmax(1)
    rest = whole.sizes[index], whole.lengths[index], y
    return Graphs(*(tensor.to(device) for tensor in (*tables, *rest)))


def _generated(count: int, largest: int, seed: int) -> Graphs:
    """Graphs without classes."""
    generator = Generator().manual_seed(seed)
    smallest = min(8, largest)
    sizes = torch.randint(smallest, largest + 1, (count,), generator=generator)
    total = int(sizes.sum())
    draws = torch.rand(total, 3, generator=generator).tolist()
    ends: list[tuple[int, int]] = []
    lengths, first = [], 0
    for size in sizes.tolist():
        bonds = _bonds(draws[first : first + size])
        ends += [(first + a, first + b) for a, b in bonds]
        lengths.append(2 * len(bonds))
        first += size
    one_way = torch.tensor(ends).T  # (2, bonds)
    kinds = torch.randint(EDGE_TYPES, (one_way.shape[1],), generator=generator)
    return Graphs(
        nodes=torch.randint(NODE_TYPES, (total,), generator=generator),
        # a bond and its reverse side by side, so that each graph's edges stay together
        edges=torch.stack([one_way, one_way.flip(0)], -1).flatten(1),
        kinds=kinds.repeat_interleave(2),
        sizes=sizes,
        lengths=torch.tensor(lengths),
        y=torch.zeros(count, dtype=torch.long),
    )


def _bonds(draws: list[list[float]]) -> list[tuple[int, int]]:
    """A tree that grows node by node, and rings; from three numbers in [0, 1) for each node."""
    degree = [0] * len(draws)
    bonds: set[tuple[int, int]] = set()
    for node, (where, closes, other) in enumerate(draws[1:], 1):
        free = [k for k in range(node) if degree[k] < NEIGHBOURS]
        wanted = [free[int(where * len(free))]]
        if closes < RINGS:
            wanted.append(free[int(other * len(free))])
        for end in wanted:
            if (end, node) not in bonds:
                bonds.add((end, node))
                degree[end] += 1
                degree[node] += 1
    return sorted(bonds)
