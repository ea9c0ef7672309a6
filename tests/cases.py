"""A table of tiny float64 models with data: `build(name)` gives a fresh, seeded `Case`.

`batches` always ends with a smaller batch. `setting` is what `kfac_approx="auto"` has to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH_SIZES = (3, 3, 1)
N_DATA = sum(BATCH_SIZES)


@dataclass(frozen=True)
class Case:
    """A model in training mode, its likelihood, and a loader (a list of batches)."""

    model: nn.Module
    likelihood: str
    batches: list[tuple[Tensor, Tensor]]
    setting: str = "reduce"

    @property
    def x(self) -> Tensor:
        """All inputs, one after another."""
        return torch.cat([x for x, _ in self.batches])

    @property
    def y(self) -> Tensor:
        """All targets, one after another."""
        return torch.cat([y for _, y in self.batches])

    @property
    def data(self) -> tuple[Tensor, Tensor, str]:
        """(x, y, likelihood), as the oracles take it."""
        return self.x, self.y, self.likelihood


class Pool(nn.Module):
    """Mean over the given axes."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class Attention(nn.Module):
    """Single-head attention with plain projections; mixes tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5
        return self.o(scores.softmax(-1) @ self.v(x))


class TokenMixer(nn.Module):
    """(n, t, i) -> (n, t, c): attention with a residual, then a head for each token."""

    def __init__(self, width: int = 3, classes: int = 3):
        super().__init__()
        self.attention = Attention(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x))


class MicroViT(nn.Module):
    """Patch embedding, position embedding, one pre-norm block, mean pooling, head."""

    def __init__(self, width: int = 4, classes: int = 3):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.3 * torch.randn(1, 4, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT + self.position
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x.mean(1))


class SharedTwice(nn.Module):
    """One linear module used twice, once around a residual."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x).tanh()
        return self.head(h + self.lin(h).tanh())


CONVS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict]] = {
    # name: (module, input shape without examples, arguments after the channels)
    "1d": (nn.Conv1d, (2, 6), {"kernel_size": 3}),
    "1d-stride-dilation": (nn.Conv1d, (2, 9), {"kernel_size": 3, "stride": 2, "dilation": 2}),
    "1d-same": (nn.Conv1d, (2, 5), {"kernel_size": 3, "padding": "same"}),
    "2d": (nn.Conv2d, (2, 4, 5), {"kernel_size": 3}),
    "2d-valid": (nn.Conv2d, (2, 4, 4), {"kernel_size": 2, "padding": "valid"}),
    "2d-zeros": (nn.Conv2d, (2, 4, 4), {"kernel_size": 3, "padding": 1}),
    "2d-reflect": (
        nn.Conv2d,
        (2, 4, 4),
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ),
    "2d-replicate": (
        nn.Conv2d,
        (2, 4, 4),
        {"kernel_size": (3, 2), "padding": (1, 0), "padding_mode": "replicate"},
    ),
    "2d-circular": (
        nn.Conv2d,
        (2, 4, 4),
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ),
    "2d-same-reflect": (
        nn.Conv2d,
        (2, 4, 5),
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
    ),
    "2d-same-dilation": (
        nn.Conv2d,
        (2, 5, 5),
        {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)},
    ),
    "2d-stride": (
        nn.Conv2d,
        (2, 5, 7),
        {"kernel_size": (2, 3), "stride": (2, 3), "padding": (1, 0), "dilation": (2, 1)},
    ),
    "2d-stride-uneven": (nn.Conv2d, (2, 6, 6), {"kernel_size": 3, "stride": 2}),
    "2d-groups": (nn.Conv2d, (4, 4, 4), {"kernel_size": 3, "padding": 1, "groups": 2}),
    "2d-depthwise": (nn.Conv2d, (4, 4, 4), {"kernel_size": 2, "groups": 4}),
    "2d-1x1": (nn.Conv2d, (2, 3, 3), {"kernel_size": 1}),
    "3d": (nn.Conv3d, (1, 3, 3, 4), {"kernel_size": 2, "stride": (1, 1, 2)}),
    "3d-replicate-groups": (
        nn.Conv3d,
        (2, 2, 3, 2),
        {"kernel_size": (1, 3, 1), "padding": (0, 1, 0), "padding_mode": "replicate", "groups": 2},
    ),
}


def build(name: str) -> Case:
    """A fresh copy of a case; the global RNG is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        return BUILDERS[name]()


def case(model: nn.Module, shape: tuple[int, ...], likelihood: str, **options: str) -> Case:
    """A case over standard-normal inputs, targets drawn to fit the model's output."""
    model = model.double()
    x = torch.randn(N_DATA, *shape, dtype=torch.float64)
    with torch.no_grad():
        output = model(x.clone())
    if likelihood == "regression":
        y = torch.randn(output.shape, dtype=torch.float64)
    elif likelihood == "binary":
        y = torch.randint(0, 2, output.shape).to(torch.float64)
    else:
        y = torch.randint(0, output.shape[-1], output.shape[:-1])
    batches = list(zip(x.split(BATCH_SIZES), y.split(BATCH_SIZES), strict=True))
    return Case(model, likelihood, batches, **options)


def conv_net(name: str, likelihood: str = "classification", **options: bool) -> Case:
    """conv -> tanh -> mean pooling -> head for an entry of CONVS."""
    module, shape, arguments = CONVS[name]
    conv = module(shape[0], 4, **arguments, **options)
    axes = tuple(range(2, 2 + len(shape) - 1))
    model = nn.Sequential(conv, nn.Tanh(), Pool(*axes), nn.Linear(4, 3))
    return case(model, shape, likelihood)


def _cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 3, 2, stride=2, bias=False),
        nn.ReLU(inplace=True),
        Pool(2, 3),
        nn.Linear(3, 3),
    )
    return case(model, (1, 4, 4), "classification")


def _linear_chain(*widths: int) -> nn.Sequential:
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*[nn.Linear(i, o) for i, o in pairs])


def _frozen(name: str) -> Case:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model.get_parameter(name).requires_grad_(False)
    return case(model, (3,), "classification")


def _activated(activation: nn.Module, likelihood: str, outputs: int) -> Case:
    model = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, outputs))
    return case(model, (4,), likelihood)


BUILDERS: dict[str, Callable[[], Case]] = {
    "deep-linear": lambda: case(_linear_chain(4, 3, 3, 2), (4,), "regression"),
    "deep-linear-expand": lambda: case(
        _linear_chain(3, 4, 3, 2), (4, 3), "regression", setting="expand"
    ),
    "deep-linear-reduce": lambda: case(
        nn.Sequential(*_linear_chain(3, 4, 3), Pool(1), nn.Linear(3, 2)), (4, 3), "regression"
    ),
    "mlp-tanh": lambda: _activated(nn.Tanh(), "classification", 3),
    "mlp-relu-inplace": lambda: _activated(nn.ReLU(inplace=True), "classification", 4),
    "mlp-regression": lambda: _activated(nn.Tanh(), "regression", 2),
    "mlp-binary": lambda: _activated(nn.Tanh(), "binary", 1),
    "cnn": _cnn,
    "tokens": lambda: case(TokenMixer(), (4, 3), "classification", setting="expand"),
    "tokens-regression": lambda: case(TokenMixer(3, 2), (3, 3), "regression", setting="expand"),
    "vit": lambda: case(MicroViT(), (1, 4, 4), "classification"),
    "frozen-bias": lambda: _frozen("0.bias"),
    "frozen-weight": lambda: _frozen("0.weight"),
    "twice": lambda: case(SharedTwice(), (3,), "classification"),
    **{f"conv-{name}": (lambda name=name: conv_net(name)) for name in CONVS},
}
NAMES = tuple(BUILDERS)
KINDS = tuple(name for name in NAMES if not name.startswith("conv-"))
