"""Evidence maximisation reaches a stationary point by either road; grids pick their best entry."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from cases import build
from posterior import dense

from kfac_laplace import KfacLaplaceError, Laplace

STRUCTURES = ("kron", "diag", "full", "lowrank")
METHODS = ("marglik", "mackay")


def fit(name, **options):
    return dense.fit(name, **options)


def evidence(la):
    return la.log_marginal_likelihood().detach()


def slopes(la, step=1e-4):
    """d evidence / d log delta by central differences, one for each value."""
    delta = la.prior_precision.detach().clone()
    found = []
    for i in range(delta.numel()):
        shift = torch.zeros_like(delta).reshape(-1)
        shift[i] = step
        shift = shift.reshape(delta.shape)
        ends = [la.log_marginal_likelihood(delta * s.exp()).detach() for s in (shift, -shift)]
        found.append((ends[0] - ends[1]) / (2 * step))
    la.log_marginal_likelihood(delta)
    return torch.stack(found)


def sigma_slope(la, step=1e-4):
    """d evidence / d log sigma by central differences."""
    delta, sigma = la.prior_precision.detach().clone(), la.sigma_noise.detach().clone()
    ends = [la.log_marginal_likelihood(delta, sigma * math.exp(s)) for s in (step, -step)]
    la.log_marginal_likelihood(delta, sigma)
    return (ends[0] - ends[1]).detach() / (2 * step)


# A slope of 1e-2 nats per e-fold: 1e-3 of the effective number of parameters, at the least.
FLAT = 1e-2


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "mlp-binary", "twice"])
def test_prior_reaches_a_stationary_point(name, method, structure):
    la, _ = fit(name, hessian_structure=structure)
    before = evidence(la)
    assert la.optimize_prior(method=method) is la
    assert evidence(la) >= before
    assert slopes(la).abs().max() < FLAT


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_at_their_prior_mean_do_not_spoil_the_others(method, structure):
    """A fresh norm bias is exactly zero: its delta has no finite optimum, the others have."""
    la, case = fit("vit", hessian_structure=structure)
    assert not case.model.norm.bias.any()
    before = evidence(la)
    la.optimize_prior(method=method)
    assert torch.isfinite(la.prior_precision).all() and torch.isfinite(evidence(la))
    assert evidence(la) > before
    assert torch.isfinite(la(case.x)).all()
    other, _ = fit("vit", hessian_structure=structure)
    other.optimize_prior(method="marglik")
    # slow directions are left where a step of log delta gains less than this
    torch.testing.assert_close(evidence(la), evidence(other), rtol=0, atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_stopping_early_is_reported(method, caplog):
    la, _ = fit("mlp-tanh", prior_precision=1e3)
    before = evidence(la)
    la.optimize_prior(method=method, n_steps=1)
    assert any("converge" in record.getMessage() for record in caplog.records)
    assert evidence(la) >= before
    caplog.clear()
    la.optimize_prior(method=method)
    assert not caplog.records


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
def test_both_methods_agree(prior, structure):
    found = []
    for method in METHODS:
        la, _ = fit("mlp-tanh", hessian_structure=structure, prior_structure=prior)
        la.optimize_prior(method=method)
        found.append((la.prior_precision.detach().log(), evidence(la)))
    (delta, value), (other_delta, other_value) = found
    torch.testing.assert_close(value, other_value, rtol=0, atol=1e-3)
    torch.testing.assert_close(delta, other_delta, rtol=0, atol=0.05)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_noise_is_optimised_jointly(temperature, method, structure):
    la, _ = fit(
        "mlp-regression", hessian_structure=structure, sigma_noise=0.3, temperature=temperature
    )
    before = evidence(la)
    la.optimize_prior(method=method)
    assert evidence(la) >= before
    assert abs(float(la.sigma_noise) - 0.3) > 0.05
    assert slopes(la).abs().max() < FLAT
    assert sigma_slope(la).abs() < FLAT


@pytest.mark.parametrize("method", METHODS)
def test_fixed_noise_stays(method):
    la, _ = fit("mlp-regression", sigma_noise=0.3)
    la.optimize_prior(method=method, fix_sigma_noise=True)
    assert float(la.sigma_noise) == pytest.approx(0.3, abs=1e-12)
    assert slopes(la).abs().max() < FLAT
    assert sigma_slope(la).abs() > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [1e-4, 1e4])
def test_far_starts_come_home(method, start):
    """Never below the start, and to the optimum found from nearby."""
    near, _ = fit("mlp-tanh")
    near.optimize_prior(method=method)
    far, _ = fit("mlp-tanh", prior_precision=start)
    before = evidence(far)
    far.optimize_prior(method=method)
    assert evidence(far) >= before
    torch.testing.assert_close(evidence(far), evidence(near), rtol=0, atol=1e-2)


def test_laplace_torchs_name_is_the_same_method():
    one, _ = fit("mlp-tanh")
    two, _ = fit("mlp-tanh")
    one.optimize_prior(method="mackay")
    two.optimize_prior_precision(method="mackay")
    assert torch.equal(one.prior_precision, two.prior_precision)


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_one_precision_for_each_parameter(structure):
    """A diagonal prior can only do better than a layerwise one at its own optimum."""
    layerwise, _ = fit("mlp-tanh", hessian_structure=structure)
    layerwise.optimize_prior()
    diagonal, case = fit("mlp-tanh", hessian_structure=structure, prior_structure="diag")
    before = evidence(diagonal)
    diagonal.optimize_prior()
    assert diagonal.prior_precision.numel() == len(dense.theta(diagonal, case.model))
    assert evidence(diagonal) >= before
    assert evidence(diagonal) >= evidence(layerwise)


def test_kron_refuses_a_diagonal_prior_with_both_remedies():
    """Kronecker eigenvectors mix parameters: use another structure or another prior."""
    with pytest.raises(KfacLaplaceError) as caught:
        Laplace(build("mlp-tanh").model, "classification", prior_structure="diag")
    assert "layerwise" in str(caught.value)
    assert "hessian_structure" in str(caught.value)


GRID = (0.01, 0.1, 1.0, 10.0, 100.0)


def validation_nll(la, delta, batches):
    """Of what calling it gives."""
    la.log_marginal_likelihood(prior_precision=torch.tensor(delta, dtype=torch.float64))
    losses = [-la(x).log().gather(1, y[:, None]) for x, y in batches]
    return float(torch.cat(losses).mean())


def overconfident(structure):
    """A posterior, and validation data for which a middle candidate is best."""
    case = build("mlp-tanh")
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(4)
    la = Laplace(case.model, "classification", hessian_structure=structure).fit(case.batches)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, dtype=torch.float64, generator=draw)
    labels = case.model(x).detach().argmax(1)
    labels[::6] = (labels[::6] + 1) % 3
    return la, [(x[:20], labels[:20]), (x[20:], labels[20:])]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_grid_search_picks_the_best_of_its_grid_every_time(structure):
    """Validation NLL of each candidate on its own; a peer's metric is never reset."""
    la, batches = overconfident(structure)
    la.posterior_scale = 1.0
    expected = min(GRID, key=lambda delta: validation_nll(la, delta, batches))
    assert expected not in (GRID[0], GRID[-1])
    for _ in range(2):
        assert la.optimize_prior(method="gridsearch", val_loader=batches, grid=GRID) is la
        chosen = la.prior_precision.detach()
        torch.testing.assert_close(chosen, torch.full_like(chosen, expected))


def test_grid_search_goes_by_the_link_that_predictions_use():
    """The probit link, by which it went whatever they use, would have another candidate."""
    la, batches = overconfident("kron")
    la.posterior_scale = 1.0
    fine = torch.logspace(-2, 2, 41).tolist()
    averages = min(fine, key=lambda delta: validation_nll(la, delta, batches))
    la._scaling = replace(la._scaling, source="loo")
    probit = min(fine, key=lambda delta: validation_nll(la, delta, batches))
    assert averages != probit
    la.optimize_prior("gridsearch", val_loader=batches, grid=fine)
    assert float(la.prior_precision[0]) == pytest.approx(probit)
    la.posterior_scale = 1.0
    la.optimize_prior("gridsearch", val_loader=batches, grid=fine)
    assert float(la.prior_precision[0]) == pytest.approx(averages)


@pytest.mark.parametrize(("kappa", "says"), [(None, "until a scale is set"), (0.0, "at κ = 0")])
def test_grid_search_where_predictions_do_not_depend_on_the_precision(kappa, says, caplog):
    """By averages at κ = 1; the log says what that means."""
    la, batches = overconfident("kron")
    if kappa is not None:
        la.posterior_scale = kappa
    with caplog.at_level(logging.INFO, logger="kfac_laplace"):
        la.optimize_prior("gridsearch", val_loader=batches, grid=GRID)
    (said,) = [r for r in caplog.records if "do not depend on δ" in r.getMessage()]
    assert said.levelno == logging.INFO and says in said.getMessage()
    chosen = float(la.prior_precision[0])
    la.posterior_scale = 1.0
    assert chosen == min(GRID, key=lambda delta: validation_nll(la, delta, batches))


def test_grid_search_has_a_grid_of_its_own():
    """Without one given: a value between 1e-4 and 1e4 that is better than either end."""
    la, case = fit("mlp-tanh")
    la.optimize_prior(method="gridsearch", val_loader=case.batches)
    chosen = float(la.prior_precision.detach()[0])
    assert 1e-4 <= chosen <= 1e4
    best = validation_nll(la, chosen, case.batches)
    assert best <= min(validation_nll(la, end, case.batches) for end in (1e-4, 1e4))


def test_grid_search_needs_validation_data():
    la, _ = fit("mlp-tanh")
    before = la.prior_precision.detach().clone()
    with pytest.raises(KfacLaplaceError, match="val_loader"):
        la.optimize_prior(method="gridsearch")
    assert torch.equal(la.prior_precision.detach(), before)


def test_unknown_method():
    la, _ = fit("mlp-tanh")
    with pytest.raises(ValueError, match="marglik"):
        la.optimize_prior(method="magic")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_mode_and_the_curvature_stay(structure):
    """Only hyperparameters move: no data pass, no weights."""
    la, case = fit("mlp-tanh", hessian_structure=structure)
    theta, hessian = dense.theta(la, case.model), dense.hessian(la, case.model)
    la.optimize_prior()
    assert torch.equal(dense.theta(la, case.model), theta)
    assert torch.equal(dense.hessian(la, case.model), hessian)
