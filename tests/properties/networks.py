"""Small networks with data, drawn by hypothesis, and what they are by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev


class Twice(nn.Module):
    """One layer that is used two times, and a parameter of its own between."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=bias)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, ..., width) to the same shape."""
        return self.layer(torch.tanh(self.scale * self.layer(x)))


class Mean(nn.Module):
    """The mean over the axes between the examples and the last."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, ..., c) to (n, c)."""
        return x.flatten(1, -2).mean(1) if x.ndim > 2 else x


#: −Σ log p(y | f) at σ = 1 up to what does not depend on f, by torch's own losses.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classification": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "regression": lambda f, y: F.mse_loss(f, y, reduction="sum") / 2,
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    "poisson": lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
}


@dataclass(frozen=True)
class Case:
    """A network, its data and where they are cut into batches.

    Args:
        model: float64, in evaluation mode.
        likelihood: by name.
        x: inputs (n, ...).
        y: targets.
        sizes: of the batches.
    """

    model: nn.Module
    likelihood: str
    x: Tensor
    y: Tensor
    sizes: tuple[int, ...]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """A loader."""
        return [*zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True)]

    @property
    def trained(self) -> dict[str, Tensor]:
        """Parameters that the posterior is over."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def outputs(self, params: dict[str, Tensor]) -> Tensor:
        """All outputs as a function of the parameters."""
        return functional_call(self.model, params, (self.x,))

    def jacobian(self) -> Tensor:
        """Derivatives (n, c, P) of the outputs, in the order of the parameters."""
        found = jacrev(self.outputs)(self.trained)
        n, c = self.outputs(self.trained).shape
        return torch.cat([found[name].reshape(n, c, -1) for name in self.trained], -1)

    def ggn(self) -> Tensor:
        """Σ_n J_nᵀ Λ_n J_n (P, P), Λ by second derivatives of torch's own loss."""
        rows, f = self.jacobian(), self.outputs(self.trained).detach()
        loss = LOSSES[self.likelihood]
        found = [
            hessian(lambda one, n=n: loss(one, self.y[n : n + 1]))(f[n : n + 1])
            for n in range(len(f))
        ]
        curved = torch.stack([each[0, :, 0] for each in found])
        return torch.einsum("ncp,ncd,ndq->pq", rows, curved, rows)


def _layers(kind: str, width: int, bias: bool) -> list[nn.Module]:
    """What a kind of network begins with, for inputs of `_inputs`."""
    if kind == "mlp":
        return [nn.Linear(3, width, bias=bias), nn.Tanh()]
    if kind == "tokens":
        return [nn.Linear(3, width, bias=bias), nn.LayerNorm(width), nn.GELU(), Mean()]
    if kind == "conv":
        return [
            nn.Conv1d(2, width, 2, padding=1, bias=bias),
            nn.SiLU(),
            nn.Flatten(1),
            nn.LazyLinear(width),
        ]
    if kind == "grouped":
        return [
            nn.Conv1d(2, 2 * width, 3, groups=2, bias=bias),
            nn.Tanh(),
            nn.Flatten(1),
            nn.LazyLinear(width),
        ]
    if kind == "embedding":
        return [nn.Embedding(5, width), nn.Tanh(), Mean()]
    return [nn.Linear(3, width, bias=bias), Twice(width, bias), Mean()]


def _inputs(kind: str, n: int, length: int) -> Tensor:
    if kind == "mlp":
        return torch.randn(n, 3)
    if kind in ("conv", "grouped"):
        return torch.randn(n, 2, length + 2)
    if kind == "embedding":
        return torch.randint(0, 5, (n, length))
    return torch.randn(n, length, 3)


KINDS = ("mlp", "tokens", "conv", "grouped", "embedding", "twice")


@st.composite
def cases(
    draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, likelihoods: tuple[str, ...] = tuple(LOSSES)
) -> Case:
    """A network of some kind with data in uneven batches, perhaps with frozen parameters."""
    kind, likelihood = draw(st.sampled_from(kinds)), draw(st.sampled_from(likelihoods))
    width, length, bias = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.booleans())
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    outputs = (
        1
        if likelihood == "binary"
        else draw(st.integers(2 if likelihood == "classification" else 1, 4))
    )
    n = sum(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        head = nn.Linear(width, outputs, bias=draw(st.booleans()))
        model = nn.Sequential(*_layers(kind, width, bias), head)
        x = _inputs(kind, n, length)
        x = x.double() if x.is_floating_point() else x
        model(x.float() if x.is_floating_point() else x)  # lazy layers take their shapes
        model = model.double().eval()
        f = torch.randn(n, outputs, dtype=torch.float64)
        y = {
            "classification": lambda: torch.randint(0, outputs, (n,)),
            "regression": lambda: f,
            "binary": lambda: (f > 0).double(),
            "poisson": lambda: f.abs().round(),
        }[likelihood]()
    named = [*model.named_parameters()]
    frozen = draw(st.sampled_from([None, *(name for name, _ in named[:-1])]))
    for name, parameter in named:
        parameter.requires_grad_(name != frozen)
    return Case(model, likelihood, x, y, sizes)
