"""Dense views of a fitted posterior: the naive algebra that the structured one has to equal.

Everything is ordered as `parameters_to_vector` orders the covered parameters. P is the number of
covered parameters.
"""

from __future__ import annotations

import oracles
import torch
from cases import Case, build
from torch import Tensor, nn

from kfac_laplace import Laplace


def fit(name: str, **options) -> tuple[Laplace, Case]:
    """A posterior fitted to a case of the table, and the case."""
    case = build(name)
    return Laplace(case.model, case.likelihood, **options).fit(case.batches), case


def covered(la: Laplace, model: nn.Module) -> list[str]:
    """Names of the parameters inside the posterior, in registration order."""
    return [name for name, _ in model.named_parameters() if la.coverage[name] != "frozen"]


def positions(la: Laplace, model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> its entries in the flat vector of covered parameters."""
    named, start, found = dict(model.named_parameters()), 0, {}
    for name in covered(la, model):
        stop = start + named[name].numel()
        found[name] = torch.arange(start, stop)
        start = stop
    return found


def block_positions(la: Laplace, model: nn.Module) -> list[Tensor]:
    """For each curvature block in order, the entries of the flat vector that its rows stand for."""
    where = positions(la, model)
    return [torch.cat([where[n] for n in b.params]) for b in la.curvature.blocks.values()]


def group_positions(la: Laplace, model: nn.Module) -> list[Tensor]:
    """The same for each group that shares a layerwise precision; one block may have many."""
    if la.curvature.options.one_block is None:
        return block_positions(la, model)
    where = positions(la, model)
    return [torch.cat([where[n] for n in g.layout.params]) for g in la.curvature.groups]


def theta(la: Laplace, model: nn.Module) -> Tensor:
    """The mode (P,)."""
    named = dict(model.named_parameters())
    return torch.cat([named[name].detach().flatten() for name in covered(la, model)])


def hessian(la: Laplace, model: nn.Module) -> Tensor:
    """Sum over examples at sigma = 1 (P, P), assembled from the blocks' own dense form."""
    size = sum(len(p) for p in positions(la, model).values())
    full = torch.zeros(size, size, dtype=torch.float64)
    blocks = la.curvature.blocks.values()
    for where, block in zip(block_positions(la, model), blocks, strict=True):
        full[where[:, None], where] = block.dense()
    return full


def delta(la: Laplace, model: nn.Module, values: Tensor | None = None) -> Tensor:
    """Prior precisions (P,) by API.md: one value, one for each group, or one for each parameter."""
    values = la.prior_precision.detach() if values is None else values
    values = values.reshape(-1).double()
    groups = group_positions(la, model)
    size = sum(len(p) for p in positions(la, model).values())
    if len(values) == size and len(values) != len(groups):
        return values
    if len(values) == 1:
        return values.expand(size).clone()
    spread = torch.zeros(size, dtype=torch.float64)
    for where, value in zip(groups, values, strict=True):
        spread[where] = value
    return spread


def scale(sigma: float | Tensor = 1.0, temperature: float = 1.0) -> float | Tensor:
    """The likelihood's precision 1/(sigma^2 T)."""
    return 1 / (sigma**2 * temperature)


def precision(la: Laplace, model: nn.Module, sigma: float = 1.0, temperature: float = 1.0):
    """P = H/(sigma^2 T) + diag(delta), (P, P)."""
    return scale(sigma, temperature) * hessian(la, model) + delta(la, model).diag()


def log_likelihood(case: Case, sigma: float = 1.0) -> Tensor:
    """Sum of log p(y_n | f_n, sigma), normalisers included, before division by T."""
    output = case.model(case.x).detach()
    return -oracles.negative_log_likelihoods(output, case.y, case.likelihood, sigma).sum()


def jacobian(la: Laplace, case: Case, x: Tensor | None = None) -> Tensor:
    """J (n, k, P) of the outputs in the covered parameters."""
    x = case.x if x is None else x
    y = case.y[: len(x)]
    return oracles.jacobian(case.model, x, y, case.likelihood, covered(la, case.model))
