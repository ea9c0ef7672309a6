"""Networks of graphs: rows are nodes and edges, of which graphs have different numbers."""

from __future__ import annotations

import pytest
import torch
from optim.captured import negative_log_likelihood
from zoo.case import build

pytest.importorskip("torch_geometric")

import zoo.models_graphs  # noqa: F401 (registers its builders)

from kfac_laplace.optim import KFAC, Damped, Estimate


@pytest.mark.parametrize("approx", ["auto", "reduce"])
@pytest.mark.parametrize("name", ["gcn-graph", "gin-graph", "gat-graph", "gcn-node"])
def test_they_learn_with_nodes_and_edges_as_rows(name, approx):
    """Left to "auto" layers of nodes and edges are expand, whatever the outputs are."""
    case = build(name)
    if "forward_fn" in case.options:
        model = Called(case.model, case.options["forward_fn"])
    else:
        model = case.model
    x, y = case.data
    optimizer = KFAC(
        model.train(),
        case.likelihood,
        rule=Damped(),
        curvature=Estimate(every=1, bases_every=1),
        kfac_approx=approx,
    )
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = negative_log_likelihood(case.likelihood, model(x), y) / len(case.examples)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    by_graph = "inner.head.weight" if name != "gcn-node" else None
    assert optimizer.settings == {
        key: "reduce" if approx == "reduce" or key == by_graph else "expand"
        for key in optimizer.settings
    }


class Called(torch.nn.Module):
    """A network with the function that calls it."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(self.inner, x)
