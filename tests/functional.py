"""Models that are one function of raw parameters, and twins of them made of linear modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import oracles
import torch
from cases import Case
from laws import EXACT, negligible, relative_error
from torch import Tensor, nn

from kfac_laplace import Curvature

Slices = Callable[[Tensor], Sequence[Tensor]]


class Functional(nn.Module):
    """`function(self, x)` of parameters and modules given by keyword, pooled into two classes.

    Args:
        function: takes the model and inputs (n, ...) to (n, ..., width).
        width: size of the last axis of what it returns.
        members: parameters and modules, as attributes.
    """

    def __init__(
        self,
        function: Callable[[Functional, Tensor], Tensor],
        width: int,
        **members: nn.Parameter | nn.Module,
    ):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, x).tanh()
        return self.head(y.reshape(len(x), -1, y.shape[-1]).mean(1))


def parameter(*shape: int) -> nn.Parameter:
    """A parameter away from zero and one."""
    return nn.Parameter(0.6 * torch.randn(shape))


def in_batches(example: Case, *sizes: int) -> Case:
    """The same data in batches of other sizes."""
    batches = list(zip(example.x.split(sizes), example.y.split(sizes), strict=True))
    return Case(example.model, example.likelihood, batches)


def linear_twin(
    example: Case,
    function: Callable[[nn.ModuleList, Tensor], Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
) -> Case:
    """The same model with a linear module for each weight (o, i), checked to be the same.

    Args:
        example: a case of a `Functional`.
        function: the model's function in terms of the linear modules.
        weights: the values of the modules' weights.
        biases: the values of their biases, if they have any.
    """
    layers = nn.ModuleList()
    for k, weight in enumerate(weights):
        layer = nn.Linear(*reversed(weight.shape), bias=biases is not None).to(weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if biases is not None:
                layer.bias.copy_(biases[k])
        layers.append(layer)
    width = example.model.head.in_features
    twin = Functional(lambda model, x: function(model.layers, x), width, layers=layers).double()
    twin.head.load_state_dict(example.model.head.state_dict())
    torch.testing.assert_close(twin(example.x), example.model(example.x))
    return Case(twin, example.likelihood, example.batches)


def assert_block_of_twin(
    twin: Case, curvature: Curvature, name: str, setting: str, places: Sequence[Tensor | None]
) -> None:
    """A block is made of those of the twin's layers by the K-FAC formula, and is zero elsewhere.

    Args:
        twin: from `linear_twin`.
        curvature: of the model that the twin stands for.
        name: of the block.
        setting: "expand" or "reduce".
        places: for each layer, where its weight's and bias's entries lie in the block; None for a
            layer that is not called.
    """
    got = curvature.blocks[name].dense()
    expected = torch.zeros_like(got)
    for k, place in enumerate(places):
        if place is None:
            continue
        bias = twin.model.layers[k].bias is not None
        factors = oracles.kfac_factors(twin.model, f"layers.{k}", twin.data, setting)
        expected[place[:, None], place] = oracles.kfac_block(factors, bias_column=bias)
    assert relative_error(got, expected, negligible(curvature)) < EXACT, name


def places_of(slices: Slices, shape: torch.Size, start: int = 0) -> list[Tensor]:
    """Which entries of a parameter each of its slices takes, counted from `start`."""
    entries = torch.arange(start, start + shape.numel()).reshape(shape)
    return [part.flatten().long() for part in slices(entries)]
