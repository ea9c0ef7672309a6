"""The optimiser's averages as the curvature of the data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import build
from optim.captured import assert_same_factors, calm, factors, negative_log_likelihood
from torch import nn

from kfac_laplace import Curvature
from kfac_laplace.errors import InvalidValue, NotFitted
from kfac_laplace.optim import KFAC, Estimate

STILL = {"lr": 0.0, "weight_decay": 0.0}
#: Sums in another order than those of the library's pass, in float64.
ROUNDING = 1e-12


def epoch(example, fisher, ema=1.0, every=1, **options):
    """One epoch at learning rate zero."""
    model = calm(example.model)
    estimate = Estimate(fisher, every=every, ema=ema)
    optimizer = KFAC(model, example.likelihood, curvature=estimate, **STILL, **options)
    for x, y in example.batches:
        optimizer.zero_grad()
        (negative_log_likelihood(example.likelihood, model(x), y) / len(x)).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-binary", "vit", "cnn", "tokens", "twice"])
def test_a_plain_average_over_an_epoch_is_the_fit_of_it(name, fisher):
    """Batches of 3, 3 and 1 examples; labels are drawn in the same order."""
    example = build(name)
    optimizer = epoch(example, fisher)
    n = sum(len(x) for x, _ in example.batches)
    got = optimizer.curvature(n)
    want = Curvature(example.model, example.likelihood, fisher=fisher).fit(example.batches)
    assert got.settings == {key: want.settings[key] for key in got.settings}
    assert (got.n_data, got.n_rows, got.n_outputs) == (n, want.n_rows, want.n_outputs)
    assert_same_factors(factors(got.blocks), factors(want.blocks), ROUNDING)
    for key, block in got.blocks.items():
        a, b = block.dense(), want.blocks[key].dense()
        assert float((a - b).abs().max()) < ROUNDING * float(b.abs().max()), key


def test_the_curvature_of_more_data_is_as_much_more():
    optimizer = epoch(build("mlp-tanh"), "exact")
    one, ten = optimizer.curvature(7), optimizer.curvature(70)
    for key, block in one.blocks.items():
        torch.testing.assert_close(10 * block.dense(), ten.blocks[key].dense())


def test_an_average_with_decay_is_the_weighted_sum_by_formula():
    """Σ β^{T−t} S_t / Σ β^{T−t} n_t for A, and for B in examples."""
    example, decay = build("mlp-tanh"), 0.6
    optimizer = epoch(example, "exact", ema=decay)
    weights = [decay**2, decay, 1.0]
    sums = {}
    for weight, (x, y) in zip(weights, example.batches, strict=True):
        one = Curvature(example.model, example.likelihood).accumulate(x, y)
        for key, (a, b) in factors(one.blocks).items():
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + weight * len(x) * a, before[1] + weight * b)
    n = sum(w * len(x) for w, (x, _) in zip(weights, example.batches, strict=True))
    want = {key: (a / n, b / n) for key, (a, b) in sums.items()}
    assert_same_factors(factors(optimizer.curvature(1).blocks), want, ROUNDING)


def test_the_first_batch_is_the_first_factor():
    example = build("mlp-tanh")
    example.batches[1:] = []
    optimizer = epoch(example, "exact", ema=0.95)
    want = Curvature(example.model, example.likelihood).accumulate(*example.batches[0])
    got = factors(optimizer.curvature(3).blocks)
    assert_same_factors(got, factors(want.blocks), ROUNDING)


def test_what_only_a_pass_over_the_data_tells_is_not_made_up():
    optimizer = epoch(build("mlp-tanh"), "mc")
    assert math.isnan(float(optimizer.curvature(7).statistic))


def test_nothing_is_claimed_before_the_first_step():
    optimizer = KFAC(nn.Linear(3, 2))
    with pytest.raises(NotFitted):
        optimizer.curvature(7)
    F.cross_entropy(optimizer._network.model(torch.ones(2, 3)), torch.tensor([0, 1])).backward()
    optimizer.step()
    with pytest.raises(InvalidValue):
        optimizer.curvature(0)


def test_averages_stay_small():
    """Half of a square for each factor, or fewer numbers than that, however long a run is."""
    torch.manual_seed(0)
    model, x = nn.Linear(40, 9), torch.randn(6, 40)
    optimizer = KFAC(model, curvature=Estimate(every=1))
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(6)).backward()
        optimizer.step()
        tensors = optimizer.curvature(6).blocks["weight"].tensors()
        assert sum(t.numel() for t in tensors.values()) <= 41 * 42 / 2 + 9 * 10 / 2 + 1
