"""Random small networks with data, as strategies: architecture, shapes, loss and batches.

A program is drawn as plain choices and built from them, so that a failure shrinks to few layers,
few examples and narrow ones, and prints as what has to be written down to see it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import Attention, Pool
from hypothesis import strategies as st
from torch import Tensor, nn

#: Outputs for each target, by likelihood; "classification" has as many as classes.
WIDTHS = {
    "classification": 1,
    "regression": 1,
    "binary": 1,
    "poisson": 1,
    "studentt": 1,
    "heteroscedastic": 2,
    "reward_modeling": 2,
}
DEGREES = 4.0  # of freedom, Student's t


class Twice(nn.Module):
    """One linear layer, used two times."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.linear(x).tanh())


class Recurrent(nn.Module):
    """A GRU over the tokens."""

    def __init__(self, width: int, out: int, bias: bool):
        super().__init__()
        self.body = nn.GRU(width, out, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[0]


class Fused(nn.Module):
    """torch's attention with a residual."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.body = nn.MultiheadAttention(width, 1, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x, x, x, need_weights=False)[0]


class Mixed(nn.Module):
    """Attention by plain projections with a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.body = Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Scaled(nn.Module):
    """A gain for each channel that no layer owns."""

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Tied(nn.Module):
    """Words in, words out: one table embeds and decodes."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.table = nn.Embedding(words, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x).mean(1) if x.ndim > 1 else self.table(x)
        return F.linear(h.tanh(), self.table.weight)


@dataclass(frozen=True)
class Program:
    """What was drawn.

    Args:
        form: of the inputs: "rows", "tokens", "signal", "image", "ids".
        shape: of one input.
        layers: each a name with its arguments, from input to head.
        keeps: whether outputs keep the positions.
        outputs: width of the outputs.
        likelihood: by name.
        sizes: of the batches.
        frozen: which parameters, counted from the first, modulo their number.
        seed: of weights and data.
    """

    form: str
    shape: tuple[int, ...]
    layers: tuple[tuple[str, tuple[Any, ...]], ...]
    keeps: bool
    outputs: int
    likelihood: str
    sizes: tuple[int, ...]
    frozen: tuple[int, ...]
    seed: int

    @property
    def targets(self) -> int:
        """Targets of a position."""
        return self.outputs // WIDTHS[self.likelihood]

    @property
    def class_axis(self) -> int | None:
        """Said where it would have to be guessed."""
        return -1 if self.keeps else None


MAKERS: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "tanh": lambda: nn.Tanh(),
    "gelu": lambda: nn.GELU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "layer norm": lambda width, affine: nn.LayerNorm(width, elementwise_affine=affine),
    "rms norm": lambda width: nn.RMSNorm(width),
    "scaled": Scaled,
    "twice": Twice,
    "gru": Recurrent,
    "attention": Mixed,
    "fused attention": Fused,
    "conv1": lambda *sizes, **options: nn.Conv1d(*sizes, **options),
    "conv": lambda dims, i, o, size, stride, padding, dilation, groups, bias: (
        nn.Conv1d if dims == 1 else nn.Conv2d
    )(i, o, size, stride, padding, dilation, groups, bias),
    "group norm": lambda width: nn.GroupNorm(1, width),
    "batch norm": lambda dims, width: (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(width),
    "embedding": lambda words, width: nn.Embedding(words, width),
    "dropout": lambda: nn.Dropout(0.4),
    "pool": lambda *axes: Pool(*axes),
    "tied": Tied,
}


def model_of(program: Program) -> nn.Module:
    """The network in float64, in training mode; frozen parameters are frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed)
        model = nn.Sequential(*[MAKERS[name](*args) for name, args in program.layers]).double()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    params = list(model.parameters())
    for k in program.frozen:
        if sum(p.requires_grad for p in params) > 1:
            params[k % len(params)].requires_grad_(False)
    return model


def data_of(program: Program, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all examples."""
    draws = torch.Generator().manual_seed(program.seed + 1)
    n, double = sum(program.sizes), torch.float64
    if program.form == "ids":
        x = torch.randint(0, 5, (n, *program.shape), generator=draws)
    else:
        x = torch.randn(n, *program.shape, generator=draws, dtype=double)
    with torch.no_grad():
        modes = {module: module.training for module in model.modules()}
        shape = model.eval()(x.clone()).shape
        for module, training in modes.items():
            module.training = training
    assert shape[-1] == program.outputs
    if program.likelihood in ("classification", "reward_modeling"):
        return x, torch.randint(0, program.outputs, shape[:-1], generator=draws)
    shape = (*shape[:-1], program.targets)
    if program.likelihood == "binary":
        return x, torch.randint(0, 2, shape, generator=draws).to(double)
    if program.likelihood == "poisson":
        return x, torch.randint(0, 4, shape, generator=draws).to(double)
    return x, torch.randn(shape, generator=draws, dtype=double)


def batches_of(program: Program, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The examples as they were cut."""
    return list(zip(x.split(program.sizes), y.split(program.sizes), strict=True))


# --- strategies ----------------------------------------------------------------------------------

booleans = st.booleans()
narrow = st.integers(1, 4)


def _row_layers(draw: st.DrawFn, width: int, form: str) -> tuple[list[Any], int]:
    """Layers of channels last, and the width after them.

    No attention over words: where all of an example are the same word, gradients of queries and
    keys cancel, and whether to nothing or to rounding noise decides if the example counts in their
    input factors. `test_an_example_of_one_word_in_attention` has that.
    """
    names = ["linear", "tanh", "gelu", "layer norm", "rms norm", "scaled", "twice", "dropout"]
    names += ["gru"] if form != "rows" else []
    names += ["attention", "fused attention"] if form == "tokens" else []
    made: list[Any] = []
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        if name in ("linear", "gru"):
            out = draw(narrow)
            made.append((name, (width, out, draw(booleans))))
            width = out
        elif name in ("twice", "fused attention"):
            made.append((name, (width, draw(booleans))))
        elif name == "layer norm":
            # Over one channel it is a constant, through which nothing passes.
            made.append((name, (width, draw(booleans))) if width > 2 else ("tanh", ()))
        elif name == "rms norm":
            made.append((name, (width,)) if width > 2 else ("tanh", ()))
        elif name in ("scaled", "attention"):
            made.append((name, (width,)))
        else:
            made.append((name, ()))
    return made, width


def _conv_layers(draw: st.DrawFn, dims: int, width: int, size: int) -> tuple[list[Any], int]:
    """Layers of channels first on inputs of `size`, and the channels after them."""
    made: list[Any] = []
    for name in draw(
        st.lists(
            st.sampled_from(["conv", "tanh", "relu in place", "batch norm", "group norm"]),
            min_size=1,
            max_size=3,
        )
    ):
        if name != "conv":
            if name == "relu in place" and made and made[-1][0] in ("tanh", name):
                continue  # they need their outputs for their gradients
            if name == "group norm" and width * size == 1:
                continue  # torch refuses to normalise one value
            arguments = {"batch norm": (dims, width), "group norm": (width,)}
            made.append((name, arguments.get(name, ())))
            continue
        kernel, padding = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        after = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if after < 1:
            kernel, stride, dilation, padding, after = 1, 1, 1, 0, size
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if width % g == 0]))
        out = groups * draw(st.integers(1, 2))
        bias = draw(booleans)
        made.append((name, (dims, width, out, kernel, stride, padding, dilation, groups, bias)))
        width, size = out, after
    return made, width


@st.composite
def programs(
    draw: st.DrawFn,
    likelihoods: tuple[str, ...] = tuple(WIDTHS),
    forms: tuple[str, ...] = ("rows", "tokens", "signal", "image", "ids"),
) -> Program:
    """Any network of at most five layers over at most seven examples."""
    likelihood, form = draw(st.sampled_from(likelihoods)), draw(st.sampled_from(forms))
    outputs = WIDTHS[likelihood]
    if likelihood == "classification":
        outputs = draw(st.integers(2, 5))
    elif likelihood != "reward_modeling":
        outputs *= draw(st.integers(1, 2))
    length, keeps, layers = draw(st.integers(1, 4)), False, []
    if form in ("signal", "image"):
        dims, width, size = (1 if form == "signal" else 2), draw(narrow), draw(st.integers(2, 5))
        shape: tuple[int, ...] = (width, *[size] * dims)
        layers, width = _conv_layers(draw, dims, width, size)
        layers += [("pool", tuple(range(2, 2 + dims)))]
    else:
        width = draw(narrow)
        shape = {"rows": (width,), "tokens": (length, width), "ids": (length,)}[form]
        layers = [("embedding", (5, width))] if form == "ids" else []
        more, width = _row_layers(draw, width, form)
        keeps = form != "rows" and likelihood != "reward_modeling" and draw(booleans)
        layers += more + ([("pool", (1,))] if form != "rows" and not keeps else [])
    layers += [("linear", (width, outputs, draw(booleans)))]
    if form == "ids" and likelihood == "classification" and outputs == 5 and draw(booleans):
        layers, keeps = [("tied", (5, width))], False
    return Program(
        form,
        shape,
        tuple(layers),
        keeps,
        outputs,
        likelihood,
        tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))),
        tuple(draw(st.lists(st.integers(0, 9), max_size=2))),
        draw(st.integers(0, 9)),
    )
