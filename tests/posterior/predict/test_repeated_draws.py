"""Samples without a generator: new ones at each call, the same ones after a fit by equal seeds."""

import copy

import pytest
import torch
from cases import build
from posterior import dense

from kfac_laplace import Laplace

ASK = {
    "parameters": lambda la, x: la.sample(2),
    "functions": lambda la, x: la.functional_samples(x, 2),
    "networks": lambda la, x: la.functional_samples(x, 2, pred_type="nn"),
    "targets": lambda la, x: la.predictive_samples(x, 2),
}


def differ(one, other):
    """No draw of one call is a draw of the other."""
    return all(not torch.equal(a, b) for a in one for b in other)


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK.keys())
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_repeated_draws_differ_and_equal_seeds_repeat_them(name, ask):
    runs = []
    for seed in (0, 0, 5):
        la, case = dense.fit(name, seed=seed)
        runs.append([ask(la, case.x) for _ in range(3)])
    first, again, other = runs
    assert differ(first[0], first[1])
    assert differ(first[1], first[2])
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    assert differ(first[0], other[0])


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK.keys())
def test_fit_and_load_begin_anew(ask, tmp_path):
    la, case = dense.fit("mlp-tanh")
    first, second = ask(la, case.x), ask(la, case.x)
    assert torch.equal(ask(la.fit(case.batches), case.x), first)
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", case.model)
    assert torch.equal(ask(loaded, case.x), first)
    assert torch.equal(ask(copy.deepcopy(la), case.x), second)


def test_draws_have_the_covariance_of_the_posterior_over_calls():
    """What repeated calls give is N(θ*, P⁻¹): its variances within five standard errors."""
    la, case = dense.fit("mlp-regression")
    draws = torch.cat([la.sample(100) for _ in range(50)])
    covariance = torch.linalg.inv(dense.precision(la, case.model))
    variance = covariance.diagonal()
    error = variance * (2 / len(draws)) ** 0.5
    assert ((draws.var(0) - variance).abs() < 5 * error).all()


def test_predictions_and_given_generators_repeat_and_leave_the_stream_alone():
    la, case = dense.fit("mlp-tanh")
    want = [la.sample(1), la.sample(1)]
    la.fit(case.batches)
    state = torch.random.get_rng_state()
    assert torch.equal(la.sample(1), want[0])
    for pred_type in ("linear", "nn"):
        one, two = (la(case.x, pred_type, n_samples=3) for _ in range(2))
        assert torch.equal(one, two)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    one, two = (la.sample(2, generator=g) for g in generators)
    assert torch.equal(one, two)
    assert torch.equal(la.sample(1), want[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_refused_fit_leaves_the_stream_where_it_was():
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    first, second = la.sample(1), la.sample(1)
    la.fit(case.batches)
    assert torch.equal(la.sample(1), first)
    with pytest.raises(ValueError, match="no batch"):
        la.fit([])
    assert torch.equal(la.sample(1), second)
