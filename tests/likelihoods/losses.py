"""Fits under loss options: a table of cases, torch's own losses, and dense algebra on these."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import BATCH_SIZES, Case, TokenMixer, build
from laws import seeded_case
from torch import Tensor

from kfac_laplace import Bernoulli, Categorical, Laplace

WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
LOSSES = {
    "tokens, ignored": ("tokens", Categorical()),
    "tokens, a class ignored": ("tokens", Categorical(ignore_index=1)),
    "tokens, weighted": ("tokens", Categorical(weight=WEIGHT)),
    "tokens, all": ("tokens", Categorical(weight=WEIGHT, label_smoothing=0.3)),
    "one row": ("mlp-tanh", Categorical(weight=WEIGHT, label_smoothing=0.3)),
    "binary": ("mlp-binary", Bernoulli(pos_weight=2.5)),
    "binary tokens": ("tokens-binary", Bernoulli(pos_weight=WEIGHT)),
}
each = pytest.mark.parametrize(("name", "likelihood"), LOSSES.values(), ids=LOSSES.keys())
STRUCTURES = ("kron", "diag", "full")


def example(name: str, likelihood: Categorical | Bernoulli) -> Case:
    """The case with other labels ignored in each example, and all of the last batch."""
    if isinstance(likelihood, Bernoulli):
        tokens = name == "tokens-binary"
        case = seeded_case(TokenMixer, (4, 3), "binary") if tokens else build(name)
        return Case(case.model, likelihood, case.batches)
    case = build(name)
    draw = torch.Generator().manual_seed(5)
    ignored = torch.rand(case.y.shape, generator=draw) < 0.4
    ignored[0], ignored[-1] = False, True
    y = case.y.where(~ignored, likelihood.ignore_index)
    batches = list(zip(case.x.split(BATCH_SIZES), y.split(BATCH_SIZES), strict=True))
    return Case(case.model, likelihood, batches)


def loss(likelihood: Categorical | Bernoulli, output: Tensor, y: Tensor) -> Tensor:
    """The loss by torch, summed."""
    if isinstance(likelihood, Bernoulli):
        weight = likelihood.pos_weight
        return F.binary_cross_entropy_with_logits(output, y, pos_weight=weight, reduction="sum")
    return F.cross_entropy(
        output if output.shape[:-1] != y.shape else output.movedim(-1, 1),
        y,
        weight=likelihood.weight,
        ignore_index=likelihood.ignore_index,
        label_smoothing=likelihood.label_smoothing,
        reduction="sum",
    )


def output_curvature(case: Case) -> tuple[Tensor, Tensor]:
    """Hessian (n, k, k) and gradient (n, k) of torch's loss in each example's outputs."""
    output = case.model(case.x).detach()
    n, k = len(output), output[0].numel()

    def losses(f: Tensor, y: Tensor) -> Tensor:
        return loss(case.likelihood, f[None], y[None])

    pairs = list(zip(output, case.y, strict=True))
    hessians = [torch.func.hessian(losses)(*pair) for pair in pairs]
    gradients = [torch.func.grad(losses)(*pair) for pair in pairs]
    return torch.stack(hessians).reshape(n, k, k), torch.stack(gradients).reshape(n, k)


def jacobian(case: Case, names: list[str]) -> Tensor:
    """J (n, k, p) of the outputs as the model returns them."""
    return oracles.parameter_jacobian(case.model(case.x).flatten(1), case.model, names)


def dense_ggn(case: Case, names: list[str]) -> Tensor:
    j = jacobian(case, names)
    return torch.einsum("nkp,nkl,nlq->pq", j, output_curvature(case)[0], j)


def fit(case: Case, **options) -> Laplace:
    return Laplace(case.model, case.likelihood, **options).fit(case.batches)
