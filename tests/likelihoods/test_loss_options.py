"""Ignored labels, weights and smoothing: torch's own losses and their derivatives, row by row."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace import Bernoulli, Categorical, Empirical, Exact, MonteCarlo

ONE = torch.ones((), dtype=torch.float64)
# Float64, sums of a few products of numbers of order one.
EXACT = {"rtol": 1e-13, "atol": 1e-14}
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.3], dtype=torch.float64)
# Another number of labels that count in each example: 3, 1, 2, 0.
LABELS = torch.tensor([[0, 1, 3], [-100, -100, 1], [2, -100, 0], [-100, -100, -100]])

CATEGORICAL = {
    "ignored": {},
    "a class ignored": {"ignore_index": 2},
    "weighted": {"weight": WEIGHT},
    "smoothed": {"label_smoothing": 0.2},
    "smoothed to the end": {"label_smoothing": 1.0},
    "all": {"ignore_index": 3, "weight": WEIGHT, "label_smoothing": 0.2},
}
BERNOULLI = {
    "one weight": {"pos_weight": 2.5},
    "weight by output": {"pos_weight": WEIGHT},
}
LOSSES = [
    *[pytest.param(Categorical(**options), id=name) for name, options in CATEGORICAL.items()],
    *[pytest.param(Bernoulli(**options), id=name) for name, options in BERNOULLI.items()],
]
each = pytest.mark.parametrize("likelihood", LOSSES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outputs(spread: float = 2.0) -> Tensor:
    return spread * torch.randn(4, 3, 4, dtype=torch.float64, generator=generator())


def targets(likelihood: Categorical | Bernoulli) -> Tensor:
    if isinstance(likelihood, Categorical):
        return LABELS.where(LABELS != -100, likelihood.ignore_index)
    y = torch.rand(4, 3, 4, dtype=torch.float64, generator=generator(1))
    y[:2] = y[:2].round()  # hard ones, and some between
    return y


def torch_loss(likelihood: Categorical | Bernoulli, f: Tensor, y: Tensor) -> Tensor:
    """The loss of rows f (..., c) by torch, summed."""
    if isinstance(likelihood, Bernoulli):
        weight = likelihood.pos_weight
        return F.binary_cross_entropy_with_logits(f, y, pos_weight=weight, reduction="sum")
    return F.cross_entropy(
        f.reshape(-1, f.shape[-1]),
        y.reshape(-1),
        weight=likelihood.weight,
        ignore_index=likelihood.ignore_index,
        label_smoothing=likelihood.label_smoothing,
        reduction="sum",
    )


def row_hessians(likelihood: Categorical | Bernoulli, f: Tensor, y: Tensor) -> Tensor:
    """Hessian of torch's loss in each row, (n, t, c, c)."""
    hessian = torch.func.hessian(lambda row, label: torch_loss(likelihood, row, label))
    rows = [hessian(f[n, t], y[n, t]) for n in range(f.shape[0]) for t in range(f.shape[1])]
    return torch.stack(rows).reshape(*f.shape, f.shape[-1])


def over_positions(by_row: Tensor) -> Tensor:
    """Block-diagonal (n, t c, t c) of row blocks (n, t, c, c)."""
    return torch.stack([torch.block_diag(*rows) for rows in by_row])


def products(vectors: list[Tensor]) -> Tensor:
    """sum_v v v^T of each example over flattened (t, c)."""
    stacked = torch.stack([v.flatten(1) for v in vectors])
    return torch.einsum("vnk,vnl->nkl", stacked, stacked)


@each
def test_log_prob_and_statistic_are_torchs_loss(likelihood):
    f, y = outputs(), targets(likelihood)
    want = torch.stack([-torch_loss(likelihood, f[n], y[n]) for n in range(len(f))])
    torch.testing.assert_close(likelihood.log_prob(f, y, ONE), want, **EXACT)
    statistic = likelihood.statistic(f[:1], y[:1]) + likelihood.statistic(f[1:], y[1:])
    got = likelihood.log_likelihood(statistic, f.numel(), ONE)
    torch.testing.assert_close(got, want.sum(), **EXACT)


@each
def test_score_is_the_gradient_of_torchs_loss(likelihood):
    f, y = outputs().requires_grad_(), targets(likelihood)
    (want,) = torch.autograd.grad(torch_loss(likelihood, f, y), f)
    torch.testing.assert_close(likelihood.score(f.detach(), y), want, **EXACT)


@each
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
def test_importance_times_the_plain_hessian_is_the_hessian_of_torchs_loss(likelihood, spread):
    f, y = outputs(spread), targets(likelihood)
    root = torch.as_tensor(1.0 if likelihood.importance(y) is None else likelihood.importance(y))
    root = root.sqrt().expand_as(f)
    got = root[..., :, None] * likelihood.hessian(f) * root[..., None, :]
    torch.testing.assert_close(got, row_hessians(likelihood, f, y), **EXACT)


@each
def test_exact_vectors_multiply_to_the_hessian_of_torchs_loss(likelihood):
    """Cross terms between positions included, which have to be zero."""
    f, y = outputs(), targets(likelihood)
    vectors = list(Exact().vectors(likelihood, f, y, generator()))
    want = over_positions(row_hessians(likelihood, f, y))
    torch.testing.assert_close(products(vectors), want, **EXACT)


@each
def test_monte_carlo_vectors_are_unbiased(likelihood):
    """20,000 copies of each example: every entry within five standard errors of the Hessian.

    Draws come from the plain softmax, also of a class that is ignored as a label.
    """
    f, y = outputs(), targets(likelihood)
    want = over_positions(row_hessians(likelihood, f, y))
    for n in range(len(f)):
        copies = 20_000
        many = f[n].expand(copies, -1, -1), y[n].expand(copies, *y[n].shape)
        (vector,) = MonteCarlo().vectors(likelihood, *many, generator(n))
        drawn = products([vector])
        error = (drawn.mean(0) - want[n]).abs()
        # an entry that never varies must be right to rounding
        assert (error <= 5 * drawn.std(0) / copies**0.5 + 1e-14).all()


@each
def test_empirical_vector_is_the_score_of_torchs_loss(likelihood):
    f, y = outputs(), targets(likelihood)
    (vector,) = Empirical().vectors(likelihood, f, y, generator())
    torch.testing.assert_close(vector, likelihood.score(f, y), rtol=0, atol=0)


def test_exact_takes_a_turn_for_each_position_that_counts_alone():
    """LABELS has at most 3 that count in one example, its last two examples at most 2."""
    f = outputs()
    assert len(list(Exact().vectors(Categorical(), f, LABELS, generator()))) == 3 * 3
    assert len(list(Exact().vectors(Categorical(), f[2:], LABELS[2:], generator()))) == 2 * 3
    assert len(list(Exact().vectors(Categorical(), f[:1], LABELS[:1], generator()))) == 3 * 3


@pytest.mark.parametrize("fisher", [Exact(), MonteCarlo(2), Empirical()], ids=type)
@pytest.mark.parametrize("options", CATEGORICAL.values(), ids=CATEGORICAL.keys())
def test_ignored_rows_count_for_nothing_whatever_the_model_says_there(fisher, options):
    likelihood = Categorical(**options)
    y = targets(likelihood)
    f, wild = outputs(), outputs()
    ignored = y == likelihood.ignore_index
    wild[ignored] = 1e300 * wild[ignored].sign()
    assert torch.equal(likelihood.log_prob(wild, y, ONE), likelihood.log_prob(f, y, ONE))
    assert torch.equal(likelihood.score(wild, y), likelihood.score(f, y))
    assert not likelihood.score(f, y)[ignored].any()
    kept = list(fisher.vectors(likelihood, f, y, generator(3)))
    for vector, other in zip(fisher.vectors(likelihood, wild, y, generator(3)), kept, strict=True):
        assert torch.equal(vector, other) and not vector[ignored].any()


def test_without_options_nothing_is_multiplied():
    """Plain losses are left to the bit as they are."""
    f, y = outputs(), LABELS.clamp_min(0)
    assert Categorical().importance(y) is None
    assert Categorical(label_smoothing=0.1).importance(y) is None
    assert Bernoulli().importance(f.sigmoid()) is None
    assert torch.equal(Categorical().score(f, y), f.softmax(-1) - F.one_hot(y, 4))


@each
def test_low_precision_outputs_keep_their_dtype(likelihood):
    f, y = outputs().float(), targets(likelihood)
    y = y.float() if y.is_floating_point() else y
    assert likelihood.score(f, y).dtype == torch.float32
    assert likelihood.log_prob(f, y, ONE.float()).dtype == torch.float32
    assert likelihood.statistic(f, y).dtype == torch.float64
    for fisher in (Exact(), MonteCarlo(), Empirical()):
        vectors = fisher.vectors(likelihood, f, y, generator())
        assert {vector.dtype for vector in vectors} == {torch.float32}


@each
def test_options_are_plain_data_that_make_the_same_likelihood_again(likelihood):
    again = type(likelihood)(**json.loads(json.dumps(likelihood.options())))
    assert again.options() == likelihood.options()
    f, y = outputs(), targets(likelihood)
    assert torch.equal(again.score(f, y), likelihood.score(f, y))
