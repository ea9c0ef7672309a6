"""Random columns and bounds: unbiased kernels, what lies below and above the exact evidence."""

from dataclasses import replace

import pytest
import torch
from posterior.objectives.exact_cases import CASES
from posterior.objectives.test_exact import moved, prepared

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.objectives import Bracket, Columns, Data, evidence_of
from kfac_laplace.posterior.objectives.columns import Signed

SEEDS = 60


def draws(la: Laplace, objective, ask) -> torch.Tensor:
    goals = (prepared(la, objective, seed=seed) for seed in range(SEEDS))
    return torch.stack([ask(goal) for goal in goals])


def error(values: torch.Tensor) -> torch.Tensor:
    """Standard error of the mean."""
    return values.std(0) / len(values) ** 0.5


def test_signed_columns_are_roots_of_the_curvature():
    """E v vᵀ = D Λ D/r, and the squared lengths of roots that are orthogonal do not vary."""
    case = CASES["several-binary"]()
    f = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0)).double()
    y = torch.zeros(2, 1, 3, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    found = [torch.cat([*Signed(2).vectors(case.likelihood, f, y, draw)], 1) for _ in range(2000)]
    products = torch.stack([v.mT @ v for v in found])
    want = case.likelihood.hessian(f)[:, 0]
    assert bool(((products.mean(0) - want).abs() <= 5 * error(products) + 1e-12).all())
    lengths = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths), rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("classes", Columns()),
        ("classes", Columns(each=2, rows=6)),
        ("cnn", Columns(rows=4)),
        ("tokens", Columns()),
        ("weighted", Columns(each=2)),
        ("regression", Columns(rows=3)),
    ],
    ids=str,
)
def test_traces_are_unbiased_and_determinants_low(name, objective):
    la = moved(CASES[name]().fitted())
    exact = prepared(la)
    traces = draws(la, objective, lambda goal: goal.curvature(la.posterior))
    want = exact.curvature(la.posterior)
    assert bool(((traces.mean(0) - want).abs() <= 4.5 * error(traces) + 1e-9).all())
    found = draws(la, objective, lambda goal: goal.log_det_ratio(la.posterior))
    assert found.mean() <= exact.log_det_ratio(la.posterior) + 4.5 * error(found)


@pytest.mark.parametrize("name", ["binary", "few-parameters"])
def test_one_column_of_one_output_is_exact(name):
    la = moved(CASES[name]().fitted())
    got, want = prepared(la, Columns()), prepared(la)
    assert float(got(la.posterior)) == pytest.approx(float(want(la.posterior)), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 4, 7, 10, 1000])
@pytest.mark.parametrize("name", ["classes", "cnn", "padded", "regression", "tokens", "weighted"])
def test_partitions_are_not_below_the_exact_determinant(name, rows):
    la = moved(CASES[name]().fitted())
    exact = prepared(la).log_det_ratio(la.posterior)
    goal = prepared(la, Bracket(rows=rows))
    below, above = (part.value(la.posterior.scale / la.prior_precision) for part in goal.around)
    assert above >= exact * (1 - 1e-12)
    assert float(goal.log_det_ratio(la.posterior)) == pytest.approx(float(below + above) / 2)
    if rows == 1000:
        assert float(above) == pytest.approx(float(exact), rel=1e-10)


def test_bounds_of_a_part_of_the_data_hold_in_expectation(monkeypatch):
    la = moved(CASES["classes"]().fitted())
    monkeypatch.setattr("kfac_laplace.posterior.objectives.bounds.MAX_GRAMS", 4 * 4 * 2 * 2)
    exact = prepared(la).log_det_ratio(la.posterior)
    weights = la.posterior.scale / la.prior_precision
    found = draws(la, Bracket(rows=4), lambda goal: goal.around[1].value(weights))
    assert found.std() > 0
    assert found.mean() >= exact - 4.5 * error(found)


@pytest.mark.parametrize(
    "name", ["classes", "cnn", "regression", "weighted", "scalar", "diag-prior"]
)
def test_reports(name):
    """Value, bracket, γ by group in order, and the constant predictor."""
    case = CASES[name]()
    la = moved(case.fitted())
    exact, bounds = la.evidence(), la.evidence("bounds")
    assert exact.lower is exact.upper is exact.standard_error is None
    assert bounds.standard_error is None
    assert bounds.lower <= bounds.value <= bounds.upper
    assert bounds.lower <= exact.value + 1e-9
    for report in (
        exact,
        bounds,
        la.evidence("columns"),
        la.evidence("kron") if name != "diag-prior" else exact,
    ):
        assert report.value.dtype == torch.float64 and report.value.shape == ()
        assert not report.value.requires_grad
        assert [*report.effective_dimensions] == [*la.curvature.blocks]
    gamma = prepared(la).effective_dimensions(la.posterior)
    assert sum(exact.effective_dimensions.values()) == pytest.approx(float(gamma.sum()), rel=1e-9)
    constant = la.likelihood.constant_log_likelihood(la.posterior.ggn.targets)
    assert float(exact.constant) == pytest.approx(constant / float(la.temperature))
    assert exact.constant.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("classes", Columns()),  # columns alone are drawn
        ("classes", Columns(each=2, rows=6)),
        ("regression", Columns(rows=3)),
    ],
    ids=str,
)
def test_the_standard_error_is_the_spread_over_seeds(name, objective):
    la = moved(CASES[name]().fitted())
    data = Data(tuple(la._data.loaders), "labels", 0)
    reports = [evidence_of(la.posterior, objective, replace(data, seed=s)) for s in range(40)]
    spread = torch.stack([each.value for each in reports]).std()
    said = torch.stack([each.standard_error for each in reports])
    assert said.dtype == torch.float64 and said[0].shape == ()
    assert spread / 2 < said.mean() < 2 * spread


def test_the_standard_error_of_what_does_not_vary_is_nothing():
    report = moved(CASES["binary"]().fitted()).evidence("columns")
    assert float(report.standard_error) == pytest.approx(0, abs=1e-9)


def test_columns_of_data_that_can_be_read_once():
    case = CASES["classes"]()
    la = moved(case.fitted())
    want, got = la.evidence("columns"), la.evidence("columns", loader=iter(case.batches))
    assert got == want


def test_a_report_of_kron_is_the_evidence():
    la = moved(CASES["vit"]().fitted())
    assert float(la.evidence("kron").value) == pytest.approx(
        float(la.log_marginal_likelihood()), rel=1e-12
    )


def test_reports_are_of_evidences():
    la = CASES["classes"]().fitted()
    with pytest.raises(InvalidValue, match="no evidence.*'kron'"):
        la.evidence(lambda posterior: posterior.log_marginal_likelihood)
    with pytest.raises(InvalidValue, match="objective"):
        la.evidence("exakt")


@pytest.mark.parametrize(("each", "rows"), [(0, 5), (3, 2), (1, 0)])
def test_numbers_of_columns_are_checked(each, rows):
    for kind in (Columns, Bracket):
        with pytest.raises(InvalidValue):
            kind(each=each, rows=rows)
