"""Layers that are written by hand, or need a frame to be called with one input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from architectures.kind import POSITIONS, VOCABULARY, WIDTH
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence


class Called(nn.Module):
    """A module called by a function; `inner` does not show in the table's names."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def called(
    make: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]
) -> Callable[[], nn.Module]:
    """Makes a module that is called by a function."""
    return lambda: Called(make(), call)


def attention(**options: object) -> Callable[[], nn.Module]:
    """Self-attention with two heads."""

    def make() -> nn.Module:
        return nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)

    return called(make, lambda module, x: module(x, x, x, need_weights=False)[0])


def cross(module: nn.Module, x: Tensor) -> Tensor:
    """The first position asks, the others answer."""
    return module(x[:, :1], x[:, 1:], x[:, 1:])[0]


def separate(module: nn.Module, x: Tensor) -> Tensor:
    """Keys and values of other widths than the queries'."""
    return module(x, x[..., :3], x[..., 1:])[0]


def packed(module: nn.Module, x: Tensor) -> Tensor:
    """Sequences packed up to their last step that is not zero; the last hidden states."""
    lengths = (x.detach() != 0).any(-1).sum(-1)
    sequences = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return module(sequences)[1][0][-1]


class With(nn.Module):
    """Parameters, and what is computed from them and the input."""

    def __init__(self, call: Callable[..., Tensor], **shapes: tuple[int, ...]):
        super().__init__()
        self.call = call
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, **dict(self.named_parameters()))


def parameters(call: Callable[..., Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Makes a module of parameters by name and shape."""
    return lambda: With(call, **shapes)


def class_token(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token.expand(len(x), -1, -1), x], 1)


def relative_bias(x: Tensor, table: Tensor) -> Tensor:
    """Attention scores with a bias by distance, as in Swin and T5."""
    places = torch.arange(POSITIONS)
    bias = table[places[:, None] - places + POSITIONS - 1]  # (t, t)
    return (x @ x.mT + bias).softmax(-1) @ x


def tied(x: Tensor, weight: Tensor) -> Tensor:
    """A language model in miniature."""
    return F.embedding(x, weight).tanh() @ weight.T


def lora(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """An adapter that is added to the weight before the product."""
    return F.linear(x, weight + up @ down)


def centres(x: Tensor, points: Tensor) -> Tensor:
    """Distances to learned points."""
    return torch.cdist(x, points)


class Symmetric(nn.Module):
    """A parametrisation: the upper triangle, mirrored."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def symmetric() -> nn.Module:
    """A linear layer whose weight is symmetric."""
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def bag(x: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(x, weight, mode="mean")


def pair(module: nn.Module, x: Tensor) -> Tensor:
    """Both halves of the features as two inputs."""
    return module(x[..., :2].contiguous(), x[..., 2:].contiguous())


def first(module: nn.Module, x: Tensor) -> Tensor:
    """The outputs of a recurrent network, or the hidden state of a cell."""
    return module(x)[0]


TABLE = (VOCABULARY, WIDTH)
SQUARE = (WIDTH, WIDTH)
