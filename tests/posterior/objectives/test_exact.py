"""The exact evidence against dense algebra, its derivatives, and what it is bounded by."""

from dataclasses import replace

import pytest
import torch
from posterior.objectives.exact_cases import CASES, dense_of, entry_precisions

from kfac_laplace import Laplace
from kfac_laplace.posterior.objectives import (
    Bracket,
    Columns,
    ExactGGN,
    forms,
    on_data,
)
from kfac_laplace.posterior.objectives.registry import Data

ALL = sorted(CASES)
#: Float64: Gram matrices and slogdet differ by rounding alone.
ROUNDING = {"rel": 1e-8, "abs": 1e-10}


def prepared(la: Laplace, objective=None, loader=None, seed: int = 0):
    loader = la._data.loaders[0] if loader is None else loader
    return on_data(objective or ExactGGN(), la.posterior, Data((loader,), "labels", seed))


def moved(la: Laplace, seed: int = 0) -> Laplace:
    """Precisions that are all different, and a σ and T that are not 1."""
    draw = torch.Generator().manual_seed(seed)
    la.prior_precision = (0.7 * torch.randn(la.posterior.prior.length, generator=draw)).exp()
    if la.likelihood.has_noise:
        la.sigma_noise = 0.6
    la.temperature = 0.8
    return la


@pytest.mark.parametrize("name", ALL)
def test_equals_the_dense_evidence(name):
    case = CASES[name]()
    la = moved(case.fitted())
    dense, delta = dense_of(case, la), entry_precisions(la)
    at = float(la.sigma_noise), float(la.temperature)
    exact = prepared(la)
    assert float(exact.log_det_ratio(la.posterior)) == pytest.approx(
        dense.log_det(delta, *at), **ROUNDING
    )
    assert float(exact(la.posterior)) == pytest.approx(dense.evidence(delta, *at), **ROUNDING)


@pytest.mark.parametrize("name", ALL)
def test_gamma_is_the_trace_by_precision(name):
    case = CASES[name]()
    la = moved(case.fitted())
    exact, delta = prepared(la), entry_precisions(la)
    dense = dense_of(case, la)
    by_entry = dense.gamma(delta, float(la.sigma_noise), float(la.temperature))
    prior = la.posterior.prior
    want = prior.shared_sums(prior.layouts.pack_vector(by_entry))
    torch.testing.assert_close(
        exact.effective_dimensions(la.posterior), want, rtol=1e-8, atol=1e-10
    )
    traces = prior.layouts.pack_vector(dense.hessian(1.0).diagonal())
    torch.testing.assert_close(
        exact.curvature(la.posterior), prior.shared_sums(traces), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("objective", [ExactGGN(), Columns(), Bracket(rows=6)], ids=str)
@pytest.mark.parametrize(
    "name", ["regression", "vit", "few-parameters", "diag-prior-few", "unused"]
)
def test_slopes_are_finite_differences(name, objective):
    """In log δ, log σ and log T, the last of which no search moves."""
    la = moved(CASES[name]().fitted())
    goal, hyper = prepared(la, objective), la.posterior.hyperparameters.detached()

    def value(logs):
        delta, sigma, temperature = logs[:-2].exp(), logs[-2].exp(), logs[-1].exp()
        there = replace(hyper, prior_precision=delta, sigma_noise=sigma, temperature=temperature)
        return goal(la.posterior.at(there))

    logs = torch.cat(
        [
            hyper.prior_precision.log(),
            hyper.sigma_noise.log()[None],
            hyper.temperature.log()[None],
        ]
    ).requires_grad_()
    (slope,) = torch.autograd.grad(value(logs), logs)
    step, numeric = 1e-5, torch.zeros_like(slope)
    with torch.no_grad():
        for k in range(len(logs)):
            shift = torch.zeros_like(logs)
            shift[k] = step
            numeric[k] = (value(logs + shift) - value(logs - shift)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-7)  # step² and rounding/step


@pytest.mark.parametrize("name", ["classes", "padded", "weighted", "tokens", "cnn"])
@pytest.mark.parametrize("delta", [1e-8, 1.0])
def test_gamma_is_at_most_the_columns(name, delta):
    """N·(C − 1) for softmax, over labels that count; K-FAC's exceeds it."""
    case = CASES[name]()
    la = case.fitted(prior_precision=delta)
    counting = sum(int((y >= 0).sum()) for _, y in case.batches)
    columns = counting * (case.model(case.batches[0][0]).shape[-1] - 1)
    for objective in (ExactGGN(), Columns(), Columns(each=3), Bracket(rows=6)):
        gamma = prepared(la, objective).effective_dimensions(la.posterior).sum()
        # Rounding is 2e-16 of the largest eigenvalue, some tens, over δ.
        assert float(gamma) <= columns * (1 + 1e-6)


@pytest.mark.parametrize("name", ["cnn", "padded", "tokens", "regression", "embedding", "weighted"])
def test_batches_and_their_order_do_not_matter(name):
    case = CASES[name]()
    la = moved(case.fitted())
    want = float(prepared(la)(la.posterior))
    singles = [pair for x, y in case.batches for pair in zip(x.split(1), y.split(1), strict=True)]
    for other in (singles, singles[::-1], case.batches[::-1]):
        assert float(prepared(la, loader=other)(la.posterior)) == pytest.approx(want, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 4000, 20_000])
@pytest.mark.parametrize("name", ["cnn", "vit", "padded", "embedding", "tokens", "groups"])
def test_tiles_of_rows_give_the_same(name, budget):
    """A memory budget decides how many rows exist at a time, and nothing else."""
    case = CASES[name]()
    want = moved(case.fitted())
    la = moved(case.fitted(memory_budget=budget))
    got = prepared(la).effective_dimensions(la.posterior)
    torch.testing.assert_close(
        got, prepared(want).effective_dimensions(want.posterior), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("name", ["few-parameters", "diag-prior-few", "classes", "scalar"])
def test_all_forms_agree(name, monkeypatch):
    """Gram matrices by precision, the dense GGN, and rows as they are."""
    la = moved(CASES[name]().fitted())
    found = []
    for parameters in (0, 2048):
        monkeypatch.setattr(forms, "MAX_PARAMETERS", parameters)
        goal = prepared(la)
        found.append((goal(la.posterior), goal.effective_dimensions(la.posterior)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


def test_float32_networks_have_float64_determinants():
    """Single-precision rows, double-precision products: as near as the rows are."""
    case = CASES["vit"]()
    double = prepared(moved(case.fitted(prior_precision=1e-4)))
    la = case.fitted()
    want = double(la.posterior)
    case.model.float()
    single = replace(case, batches=[(x.float(), y) for x, y in case.batches])
    la32 = single.fitted()
    got = prepared(la32)(la32.posterior)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_more_rows_than_allowed_name_what_takes_them():
    case = CASES["cnn"]()
    la = case.fitted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfac_laplace.posterior.objectives.exact.MAX_ROWS", 13)
        patch.setattr("kfac_laplace.posterior.objectives.exact.MAX_PARAMETERS", 13)
        with pytest.raises(Exception, match="14 output columns.*at most 13.*'columns'"):
            la.evidence("exact")
    la.evidence("exact")
