"""Models with data for objectives of exact curvature, and what they have to equal.

The dense evidence is written with autograd alone: Jacobians row by row, and the Hessian of the loss
in the outputs, whose formula is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from cases import build
from torch import Tensor, nn

from kfac_laplace import Bernoulli, Categorical, Laplace, Poisson

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax(f: Tensor, y: Tensor, sigma: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f.reshape(-1, f.shape[-1]), y.flatten(), reduction="sum", **options)


def gaussian(f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    squares = ((f - y) / sigma).square().sum()
    return 0.5 * squares + f.numel() * (sigma.log() + 0.5 * math.log(2 * math.pi))


def bernoulli(f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y.to(f), reduction="sum")


def poisson(f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    return (f.exp() - y * f + torch.lgamma(y + 1)).sum()


@dataclass(frozen=True)
class ExactCase:
    """A model, its likelihood and batches, and the loss −log p(y | f, σ)."""

    model: nn.Module
    likelihood: Any
    batches: list[tuple[Tensor, Tensor]]
    loss: Loss
    options: dict[str, Any] = field(default_factory=dict)

    def fitted(self, **options: Any) -> Laplace:
        return Laplace(self.model, self.likelihood, **{**self.options, **options}).fit(self.batches)


def _data(n: int, shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).double()


def _labels(shape: tuple[int, ...], classes: int, seed: int = 4) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def _split(x: Tensor, y: Tensor, sizes: tuple[int, ...] = (3, 3, 1)) -> list[tuple[Tensor, Tensor]]:
    return [*zip(x.split(sizes), y.split(sizes), strict=True)]


def _of_table(name: str, **options: Any) -> ExactCase:
    case = build(name)
    losses = {"classification": softmax, "regression": gaussian, "binary": bernoulli}
    return ExactCase(case.model, case.likelihood, case.batches, losses[case.likelihood], options)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def _mlp(outputs: int) -> nn.Module:
    return _seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


def _counts() -> ExactCase:
    y = _labels((7, 2), 5).double()
    return ExactCase(_mlp(2), Poisson(), _split(_data(7, (4,)), y), poisson)


def _several_binary() -> ExactCase:
    y = _labels((7, 3), 2).double()
    return ExactCase(_mlp(3), Bernoulli(), _split(_data(7, (4,)), y), bernoulli)


def _weighted() -> ExactCase:
    """Weights, smoothing and ignored labels; one batch without any that counts."""
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    y = _labels((7,), 3)
    y[1] = y[6] = -100
    likelihood = Categorical(weight=weight, label_smoothing=0.1)

    def loss(f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        return softmax(f, y, sigma, weight=weight, label_smoothing=0.1)

    return ExactCase(_mlp(3), likelihood, _split(_data(7, (4,)), y), loss)


def _padded() -> ExactCase:
    """Sequences padded batch by batch; tokens behind the end have labels that are ignored."""
    batches = []
    for k, (n, t) in enumerate([(3, 4), (3, 2), (1, 3)]):
        x, y = _data(n, (t, 3), 7 + k), _labels((n, t), 3, k)
        for row in range(1, n):
            x[row, t - row :], y[row, t - row :] = 0, -100
        batches.append((x, y))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return ExactCase(_seeded(lambda: model), "classification", batches, softmax)


def _table_of_words() -> ExactCase:
    """Looked-up rows, some of them twice in one example."""
    model = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    x = _labels((7, 4), 6, 9)
    return ExactCase(_seeded(lambda: model), "classification", _split(x, _labels((7,), 3)), softmax)


def _few_parameters() -> ExactCase:
    """More rows than parameters."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = _data(20, (2,))
    y = x.prod(1, keepdim=True) + 0.1 * _data(20, (1,), 5)
    return ExactCase(_seeded(lambda: model), "regression", _split(x, y, (8, 8, 4)), gaussian)


def _partly_unused() -> ExactCase:
    """A layer on which no output depends."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x)

    y = _labels((7,), 3)
    return ExactCase(_seeded(Unused), "classification", _split(_data(7, (4,)), y), softmax)


CASES: dict[str, Callable[[], ExactCase]] = {
    "classes": lambda: _of_table("mlp-tanh"),
    "binary": lambda: _of_table("mlp-binary"),
    "several-binary": _several_binary,
    "regression": lambda: _of_table("mlp-regression"),
    "poisson": _counts,
    "cnn": lambda: _of_table("cnn"),
    "vit": lambda: _of_table("vit"),
    "tokens": lambda: _of_table("tokens"),
    "tokens-regression": lambda: _of_table("tokens-regression"),
    "tied": lambda: _of_table("twice"),
    "padded": _padded,
    "weighted": _weighted,
    "embedding": _table_of_words,
    "few-parameters": _few_parameters,
    "last-layer": lambda: _of_table("cnn", subset_of_weights="last_layer"),
    "some": lambda: _of_table("vit", subset_of_weights=["*norm*", "head.*", "position"]),
    "split-bias": lambda: _of_table("vit", joint_bias=False),
    "scalar": lambda: _of_table("cnn", prior_structure="scalar"),
    "patterns": lambda: _of_table(
        "vit",
        joint_bias=False,
        prior_structure={"*.bias": "scalar", "attention*": "scalar", "*": "layerwise"},
    ),
    "diag-prior": lambda: _of_table("cnn", prior_structure="diag", hessian_structure="diag"),
    "unit-prior": lambda: _of_table("mlp-tanh", prior_structure="unit", hessian_structure="full"),
    "diag-prior-few": lambda: ExactCase(
        _few_parameters().model,
        "regression",
        _few_parameters().batches,
        gaussian,
        {"prior_structure": "diag", "hessian_structure": "full"},
    ),
    "full": lambda: _of_table("vit", hessian_structure="full"),
    "groups": lambda: _of_table("conv-2d-groups"),
    "unused": _partly_unused,
}


def entry_precisions(la: Laplace) -> Tensor:
    """δ of each entry, in the order of `parameters_to_vector`."""
    prior = la.posterior.prior
    by_group = prior.by_group(la.prior_precision)
    groups = prior.layouts.groups.items()
    return prior.layouts.flatten({n: by_group[n].expand(g.matrix) for n, g in groups})


def _gradient(entry: Tensor, params: list[nn.Parameter]) -> Tensor:
    """∂ entry/∂θ (p,)."""
    found = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
    pairs = zip(found, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@dataclass(frozen=True)
class Dense:
    """The exact GGN at σ = 1 of a case, and its log-likelihood at any."""

    case: ExactCase
    names: tuple[str, ...]

    def hessian(self, sigma: float) -> Tensor:
        """Σ Jᵀ Λ J (p, p) of the loss at σ, example by example."""
        params = [dict(self.case.model.named_parameters())[name] for name in self.names]
        size = sum(p.numel() for p in params)
        total = torch.zeros(size, size, dtype=torch.float64)
        noise = torch.tensor(sigma, dtype=torch.float64)
        for x, y in self.case.batches:
            for one, target in zip(x.split(1), y.split(1), strict=True):
                f = self.case.model(one)
                jacobian = torch.stack([_gradient(entry, params) for entry in f.flatten()])

                def loss(flat: Tensor, shape: torch.Size = f.shape, y: Tensor = target) -> Tensor:
                    return self.case.loss(flat.reshape(shape), y, noise)

                inner = torch.autograd.functional.hessian(loss, f.detach().flatten())
                total += jacobian.T @ inner @ jacobian
        return total

    def log_likelihood(self, sigma: float) -> float:
        noise = torch.tensor(sigma, dtype=torch.float64)
        with torch.no_grad():
            return -sum(
                float(self.case.loss(self.case.model(x), y, noise)) for x, y in self.case.batches
            )

    def theta(self) -> Tensor:
        named = dict(self.case.model.named_parameters())
        return torch.cat([named[name].detach().flatten() for name in self.names])

    def log_det(self, delta: Tensor, sigma: float = 1.0, temperature: float = 1.0) -> float:
        root = delta.rsqrt()
        scaled = root[:, None] * self.hessian(sigma) / temperature * root
        return float(torch.linalg.slogdet(torch.eye(len(root)).double() + scaled)[1])

    def evidence(self, delta: Tensor, sigma: float = 1.0, temperature: float = 1.0) -> float:
        scatter = float((delta * self.theta().square()).sum())
        fit = self.log_likelihood(sigma) / temperature
        return fit - 0.5 * (self.log_det(delta, sigma, temperature) + scatter)

    def gamma(self, delta: Tensor, sigma: float = 1.0, temperature: float = 1.0) -> Tensor:
        """1 − δ_i [P⁻¹]_ii of each entry."""
        precision = self.hessian(sigma) / temperature + delta.diag()
        return 1 - delta * torch.linalg.inv(precision).diagonal()


def dense_of(case: ExactCase, la: Laplace) -> Dense:
    return Dense(case, tuple(la.posterior.prior.layouts.params))
