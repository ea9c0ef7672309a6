"""Gradients and factors out of nothing, and steps of a rule on them."""

import torch
from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases
from kfac_laplace.optim.decomposition import BasesTable
from kfac_laplace.optim.rules import descend_

#: b > 1, sides of width one, two groups of one shape (turned together), a large one (turned alone).
SHAPES = {
    "first": (1, 3, 4),
    "second": (2, 3, 4),
    "row": (1, 1, 5),
    "column": (3, 4, 1),
    "large": (1, 90, 100),
}


def factor(b, d, dtype=torch.float64):
    """A well-conditioned factor (b, d, d) with distinct eigenvalues."""
    rows = torch.randn(b, 3 * d + 2, d, dtype=dtype)
    return rows.mT @ rows / rows.shape[1]


def softmax_factor(c, dtype=torch.float64):
    """The mean of diag(p) − p pᵀ, of rank c − 1."""
    p = torch.randn(20, c, dtype=dtype).softmax(-1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0, keepdim=True)


def factors_of(shapes, dtype=torch.float64):
    return {name: (factor(b, o, dtype), factor(b, i, dtype)) for name, (b, o, i) in shapes.items()}


def gradients_of(shapes, dtype=torch.float64):
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def dense(left: Tensor, right: Tensor) -> Tensor:
    """B ⊗ A of one block, rows in the order of a flattened matrix (o, i)."""
    return torch.kron(left, right)


class Run:
    """Weights that a rule moves: what an optimiser does with gradients and factors of a step."""

    def __init__(self, rule, shapes, *, every=1, largest=4096, dtype=torch.float64):
        self.rule, self.names = rule, list(shapes)
        self.weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        self.states = {name: rule.init(weight) for name, weight in self.weights.items()}
        self.table = BasesTable(shapes, every=every, largest=largest)
        self.steps = 0

    def bases(self) -> Eigenbases:
        return self.table.eigenbases(self.names, list(self.weights.values()))

    def step(self, gradients, factors, lr=0.1, weight_decay=0.0, dampings=None):
        """One step; the updates U as matrices, by name."""
        self.steps += 1
        states, before = [self.states[name] for name in self.names], self.bases()
        if self.table.update(self.steps, factors):
            self.rule.turn(states, before, self.bases())
        listed = [gradients[name] for name in self.names]
        directions = self.rule.directions(listed, states, self.bases(), dampings)
        updates = self.rule.lengths(directions, [lr] * len(listed))
        weights = [self.weights[name] for name in self.names]
        descend_(weights, updates, lr=lr, weight_decay=weight_decay)
        return {name: one.matrices() for name, one in zip(self.names, updates, strict=True)}


def assert_all_close(found, expected, rtol=1e-10):
    """Relative to each tensor's largest entry: float64 rounding through bases is some 1e-13."""
    assert found.keys() == expected.keys()
    for name in found:
        atol = rtol * float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol, msg=name)
