"""The hybrid estimator: leading roots of Lambda exactly, the rest by random signs."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import build, case
from laws import EXACT, assert_same_blocks, dense_blocks, fitted, relative_error
from torch import Tensor, nn

from kfac_laplace import (
    Bernoulli,
    Categorical,
    Curvature,
    Exact,
    Gaussian,
    Hybrid,
    KfacLaplaceError,
    Laplace,
    MonteCarlo,
)
from kfac_laplace.likelihoods.stick_breaking import StickBreaking

ROWS = torch.tensor([[0.5, -1.0, 1.5, 0.1], [2.0, 0.0, -0.5, 3.0]], dtype=torch.float64)  # (t, c)
WEIGHTED = Categorical(weight=[0.5, 1.0, 2.0, 0.0], label_smoothing=0.1)
LIKELIHOODS = {
    "classification": Categorical(),
    "weighted": WEIGHTED,
    "regression": Gaussian(),
    "binary": Bernoulli(pos_weight=[0.5, 1.0, 2.0, 3.0]),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(fisher: Hybrid, likelihood, f: Tensor, y: Tensor, seed: int = 0) -> list[Tensor]:
    return list(fisher.vectors(likelihood, f, y, generator(seed)))


def targets(likelihood, f: Tensor) -> Tensor:
    """Some labels or values for outputs f (n, t, c)."""
    if isinstance(likelihood, Categorical):
        return torch.arange(f.shape[1]).expand(f.shape[:2])
    return (f > 0).to(f)


def products(found: list[Tensor]) -> Tensor:
    """sum_v v v^T over flattened (t, c), shape (n, k, k)."""
    stacked = torch.stack([v.flatten(1) for v in found])  # (v, n, k)
    return torch.einsum("vnk,vnl->nkl", stacked, stacked)


def weighted_hessian(likelihood, f: Tensor, y: Tensor) -> Tensor:
    """D Lambda D over flattened (t, c), shape (n, k, k), without roots."""
    n, t, c = f.shape
    m = likelihood.importance(y)
    d = torch.ones_like(f) if m is None else m.to(f).sqrt().expand_as(f)
    dense = torch.zeros(n, t, c, t, c, dtype=f.dtype)
    for j in range(t):
        hessian = likelihood.hessian(f)[:, j]
        dense[:, j, :, j] = d[:, j, :, None] * hessian * d[:, j, None]
    return dense.reshape(n, t * c, t * c)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_unbiased_for_several_positions(name, passes):
    """40,000 copies of two positions: every entry within four standard errors of D Lambda D."""
    likelihood = LIKELIHOODS[name]
    f = ROWS.expand(40_000, 2, 4)
    y = targets(likelihood, f)
    found = vectors(Hybrid(passes), likelihood, f, y)
    assert len(found) == passes
    draws = products(found)
    error = (draws.mean(0) - weighted_hessian(likelihood, f[:1], y[:1])[0]).abs()
    spread = draws.std(0) / len(draws) ** 0.5
    # 1e-12: entries that do not vary are right to rounding
    assert (error <= 4 * spread + 1e-12).all()
    assert spread.max() > 1e-4, "nothing was left to chance"


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
@pytest.mark.parametrize("fisher", [Hybrid(99), Hybrid(tolerance=0)], ids=["passes", "tolerance"])
def test_as_many_passes_as_roots_are_exact(likelihood, fisher):
    f = 3 * torch.randn(6, 1, 4, dtype=torch.float64, generator=generator(3))
    y = targets(likelihood, f)
    found = vectors(fisher, likelihood, f, y)
    assert len(found) == len(list(likelihood.roots(f)))
    assert (products(found) - weighted_hessian(likelihood, f, y)).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "cnn", "vit"])
def test_exact_blocks_without_tolerance(name):
    got, want = fitted(name, fisher=Hybrid(tolerance=0.0)), fitted(name)
    assert_same_blocks(dense_blocks(got), dense_blocks(want), EXACT)


def test_positions_that_do_not_mix_need_no_luck():
    """A layer applied token by token: B sums over rows, in which signs square away."""
    torch.manual_seed(1)
    data = case(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), (6, 3), "classification"
    )
    got = fitted(data, fisher=Hybrid(4))
    assert_same_blocks(dense_blocks(got), dense_blocks(fitted(data)), EXACT)


def test_factors_are_unbiased_where_tokens_mix():
    """B of the value projection over 100 seeds, in two passes for four positions."""
    example = build("tokens")
    want = fitted(example).blocks["attention.v.weight"].factors.output[0]
    batch = [(example.x, example.y)]
    draws = torch.stack(
        [
            fitted(example, batch, fisher=Hybrid(2), seed=seed)
            .blocks["attention.v.weight"]
            .factors.output[0]
            for seed in range(100)
        ]
    )
    assert ((draws.mean(0) - want).abs() <= 4 * draws.std(0) / 10).all()
    assert relative_error(draws[0], want) > 1e-3, "a single draw cannot be exact"


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier of ten overlapping clusters after 150 steps, with 64 of its examples."""
    torch.manual_seed(2)
    y = torch.arange(640) % 10
    x = 1.5 * torch.randn(10, 6, dtype=torch.float64)[y] + torch.randn(640, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x[:64], y[:64]


@pytest.mark.slow
def test_errors_fall_much_faster_than_those_of_labels():
    """Mean relative errors of B over 20 seeds, as shares of those of as many label draws."""
    model, x, y = trained()

    def factor(fisher, seed: int = 0) -> Tensor:
        curvature = Curvature(model, "classification", fisher=fisher, seed=seed)
        return curvature.accumulate(x, y).blocks["0.weight"].factors.output

    want = factor(Exact())

    def error(fisher) -> float:
        return sum(relative_error(factor(fisher, seed), want) for seed in range(20)) / 20

    shares = [error(Hybrid(k)) / error(MonteCarlo(k)) for k in (1, 2, 3, 5)]
    # 0.36, 0.16, 0.08 and 0.03 here; 0.48, 0.22, 0.10 and 0.015 on another network.
    assert all(share < bound for share, bound in zip(shares, (0.6, 0.3, 0.15, 0.05), strict=True))
    assert relative_error(factor(Hybrid(9)), want) < EXACT


@pytest.mark.parametrize("likelihood", [Categorical(), WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("tolerance", [0.3, 0.05, 0.001])
def test_tolerance_bounds_the_share_left_to_chance(tolerance, likelihood):
    """By the traces of the leading vectors, which hold no luck; one pass fewer exceeds it."""
    c = 4 if likelihood is WEIGHTED else 12
    f = 2 * torch.randn(30, 2, c, dtype=torch.float64, generator=generator(4))
    y = torch.randint(0, c, (30, 2), generator=generator(5))
    total = weighted_hessian(likelihood, f, y).diagonal(dim1=-2, dim2=-1).sum()
    leading = vectors(Hybrid(tolerance=tolerance), likelihood, f, y)[:-1]
    traces = [v.square().sum() for v in leading]
    if len(leading) < c - 2:  # otherwise the last vector is one root, exact as well
        assert total - sum(traces) <= tolerance * total
    assert total - sum(traces[:-1]) > tolerance * total


def test_the_batch_decides_together():
    """One unsure row among sure ones does not ask for all passes."""
    f = torch.zeros(50, 1, 8, dtype=torch.float64)
    f[1:, :, 0] = 6.0
    y = torch.zeros(50, 1, dtype=torch.long)
    alone = vectors(Hybrid(tolerance=0.6), Categorical(), f[:1], y[:1])
    together = vectors(Hybrid(tolerance=0.6), Categorical(), f, y)
    assert len(together) < len(alone) < 7


def test_classes_come_by_probability():
    """The first vector holds the most probable class of each row, wherever it is."""
    f = torch.tensor([[[0.0, 5.0, 1.0]], [[7.0, 0.0, -1.0]]], dtype=torch.float64)
    first = vectors(Hybrid(2), Categorical(), f, torch.zeros(2, 1, dtype=torch.long))[0]
    assert torch.equal(first[:, 0].abs().argmax(-1), torch.tensor([1, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 20.0, 300.0])
def test_columns_mix_as_their_sum(scale, dtype):
    """Also where tails underflow."""
    f = scale * torch.randn(5, 2, 7, generator=generator(6), dtype=dtype)
    columns = StickBreaking(f.softmax(-1).sort(-1, descending=True).values)
    coefficients = torch.randn(5, 2, 6, generator=generator(7), dtype=dtype)
    singles = torch.stack([columns.column(c) for c in range(6)], -1)  # (n, t, c, r)
    want = (singles * coefficients[:, :, None]).sum(-1)
    eps = torch.finfo(dtype).eps
    assert ((columns.mixed(coefficients) - want).abs() <= 50 * eps * want.abs().max()).all()
    squares = singles.square().sum(-2)
    # Squares of probabilities underflow where these fall below the root of the smallest number.
    floor = torch.finfo(dtype).tiny ** 0.5
    assert ((columns.squares() - squares).abs() <= 50 * eps * squares + floor).all()


def test_certain_and_ignored_rows_are_fine():
    f = torch.tensor([[[800.0, 0.0, -800.0]], [[0.0, 0.0, 900.0]]])
    for y in (torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), -100)):
        (vector,) = vectors(Hybrid(), Categorical(), f, y)
        assert vector.shape == f.shape and not vector.any()


def test_every_batch_draws_its_own_signs():
    example = build("mlp-tanh")
    batch = example.batches[0]
    once, twice = (
        fitted(example, [batch] * n, fisher=Hybrid(1)).blocks["0.weight"].factors.output
        for n in (1, 2)
    )
    assert relative_error(twice, 2 * once) > 1e-2


def test_global_rng_is_left_as_found():
    before = torch.get_rng_state()
    fitted("mlp-tanh", fisher="hybrid")
    assert torch.equal(torch.get_rng_state(), before)


def test_own_likelihoods_keep_the_order_of_their_roots():
    """A subclass with its own roots does not get the softmax's."""

    class Doubled(Categorical):
        def roots(self, f: Tensor):
            yield from (2**0.5 * root for root in super().roots(f))

    f = ROWS[:, None]
    y = torch.zeros(2, 1, dtype=torch.long)
    got = products(vectors(Hybrid(3), Doubled(), f, y))
    want = products(list(Exact().vectors(Categorical(), f, y, generator())))
    assert (got - 2 * want).abs().max() < 1e-14


def test_name_and_state_round_trip(tmp_path):
    example = build("mlp-tanh")
    assert Curvature(example.model, "classification", fisher="hybrid").options.fisher == Hybrid()
    fisher = Hybrid(passes=1, tolerance=0.2)
    la = Laplace(example.model, "classification", fisher=fisher, seed=5)
    la.fit(example.batches[:1])
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", build("mlp-tanh").model)
    assert loaded.curvature.options.fisher == fisher
    for posterior in (la, loaded):  # the draws go on where they were
        posterior.fit(example.batches[1:], override=False)
    assert_same_blocks(dense_blocks(loaded.curvature), dense_blocks(la.curvature), 0.0)


def test_oracle_agrees_with_the_reference_of_these_tests():
    want = oracles.output_hessian(ROWS[None], torch.zeros(1, 2, dtype=torch.long), "classification")
    got = weighted_hessian(Categorical(), ROWS[None], torch.zeros(1, 2, dtype=torch.long))
    assert (got - want).abs().max() < 1e-15


@pytest.mark.parametrize("options", [{"passes": 0}, {"tolerance": -0.1}, {"tolerance": 1.5}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(KfacLaplaceError, match=next(iter(options))) as caught:
        Hybrid(**options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("options", [{"passes": 1.5}, {"passes": True}, {"tolerance": "small"}])
def test_numbers_of_other_types_are_refused(options):
    with pytest.raises(KfacLaplaceError, match=next(iter(options))) as caught:
        Hybrid(**options)
    assert isinstance(caught.value, TypeError)
