"""Objectives: names, functions, what is refused, and one of a user's own."""

import pytest
import torch
from cases import build
from posterior import dense
from posterior.objectives.toy import gamma_hyperprior

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.posterior.objectives import resolve_objective
from kfac_laplace.posterior.objectives.evidence import log_marginal_likelihood

STRUCTURES = ("kron", "diag", "full", "lowrank")


@pytest.mark.parametrize("name", ["auto", "kron"])
def test_names_of_the_evidence(name):
    assert resolve_objective(name) is log_marginal_likelihood


def test_functions_are_taken_as_they_are_and_nonsense_is_refused():
    assert resolve_objective(gamma_hyperprior) is gamma_hyperprior
    with pytest.raises(InvalidValue, match="objective.*auto"):
        resolve_objective("evidense")
    with pytest.raises(InvalidType, match="objective"):
        resolve_objective(3)


def stationary(la, objective, step=1e-4):
    """Largest slope of an objective in log δ, by central differences."""
    posterior, slopes = la.posterior, []
    hyper = posterior.hyperparameters.detached()
    for i in range(len(hyper.prior_precision)):
        ends = []
        for sign in (step, -step):
            delta = hyper.prior_precision.clone()
            delta[i] *= torch.tensor(sign, dtype=torch.float64).exp()
            moved = type(hyper)(delta, hyper.sigma_noise, hyper.temperature)
            ends.append(float(objective(posterior.at(moved))))
        slopes.append((ends[0] - ends[1]) / (2 * step))
    return max(abs(slope) for slope in slopes)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_objective_of_ones_own_is_maximised(structure):
    """The evidence with a hyperprior on δ, of which nothing in the package knows."""
    la, _ = dense.fit("mlp-tanh", hessian_structure=structure)
    la.optimize_prior(objective=gamma_hyperprior)
    assert stationary(la, gamma_hyperprior) < 1e-3
    assert stationary(la, log_marginal_likelihood) > 1e-2
    plain, _ = dense.fit("mlp-tanh", hessian_structure=structure)
    plain.optimize_prior()
    assert gamma_hyperprior(la.posterior) > gamma_hyperprior(plain.posterior)


def test_the_noise_is_chosen_by_the_same_objective():
    la, _ = dense.fit("mlp-regression")
    la.optimize_prior(objective=gamma_hyperprior)
    slope = torch.autograd.functional.jacobian(
        lambda sigma: la.log_marginal_likelihood(sigma_noise=sigma), la.sigma_noise.detach()
    )
    assert abs(float(slope)) < 1e-3  # the hyperprior does not know σ


def test_a_tuner_follows_its_objective_and_records_the_evidence():
    case = build("mlp-tanh")
    tuner = MarglikTuner(
        case.model, "classification", 7, objective=gamma_hyperprior, n_hypersteps=300
    )
    record = tuner.step(case.batches)
    la = Laplace(case.model, "classification").fit(case.batches)
    la.optimize_prior(objective=gamma_hyperprior)
    delta = record.hyperparameters["prior_precision"]
    torch.testing.assert_close(delta, la.prior_precision, rtol=0.02, atol=0)
    la.prior_precision = delta
    assert record.evidence == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-9)
    assert record.objective == pytest.approx(float(gamma_hyperprior(la.posterior)), rel=1e-9)


def test_the_best_record_is_that_of_the_objective():
    case = build("mlp-tanh")
    tuner = MarglikTuner(
        case.model,
        "classification",
        7,
        objective=gamma_hyperprior,
        prior_precision=30.0,
        lr_hyp=1.0,
    )
    for _ in range(4):
        tuner.step(case.batches)
    assert tuner.best.objective == max(record.objective for record in tuner.history)


def test_the_training_loop_takes_an_objective_a_mean_and_a_method():
    case = build("mlp-tanh")
    la, _, margliks, _ = marglik_training(
        case.model,
        case.batches,
        n_epochs=2,
        objective=gamma_hyperprior,
        prior_mean={"*bias": 0.5, "*": 0.0},
    )
    assert la.prior_mean == {"*bias": 0.5, "*": 0.0} and len(margliks) == 2
    la, *_ = marglik_training(build("cnn").model, build("cnn").batches, n_epochs=1, method="mackay")
    assert len(la.prior_precision) == 3


def test_mackay_knows_the_evidence_alone():
    la, case = dense.fit("mlp-tanh")
    la.optimize_prior("mackay", objective="kron")
    before = la.prior_precision.detach().clone()
    with pytest.raises(InvalidValue, match="gamma_hyperprior.*marglik"):
        la.optimize_prior("mackay", objective=gamma_hyperprior)
    assert torch.equal(la.prior_precision, before)
    with pytest.raises(InvalidValue, match="marglik"):
        MarglikTuner(case.model, "classification", 7, method="mackay", objective=gamma_hyperprior)


def test_a_grid_search_has_its_own():
    la, case = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="objective"):
        la.optimize_prior("gridsearch", objective=gamma_hyperprior, val_loader=case.batches)


@pytest.mark.parametrize(
    ("objective", "error", "words"),
    [
        (lambda posterior: 1.0, InvalidType, "tensor"),
        (lambda posterior: posterior.squares, InvalidValue, "one number"),
        (lambda posterior: posterior.log_marginal_likelihood.detach(), UnsupportedUse, "gradient"),
    ],
    ids=["number", "vector", "detached"],
)
def test_functions_that_are_no_objectives(objective, error, words):
    la, case = dense.fit("mlp-tanh")
    before = la.prior_precision.detach().clone()
    with pytest.raises(error, match=words):
        la.optimize_prior(objective=objective)
    assert torch.equal(la.prior_precision, before)
    tuner = MarglikTuner(case.model, "classification", 7, objective=objective)
    with pytest.raises(error, match=words):
        tuner.step(case.batches)
    assert not tuner.history


def test_unknown_objectives_name_the_option():
    la, case = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="objective"):
        la.optimize_prior(objective="exakt")
    with pytest.raises(InvalidValue, match="objective"):
        MarglikTuner(case.model, "classification", 7, objective="exakt")


def test_an_objective_that_leaves_its_domain_changes_nothing(caplog):
    """Just beyond its start it is not a number, and uphill leads there."""
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    before = la.prior_precision.clone()

    def bounded(posterior):
        delta = posterior.hyperparameters.prior_precision
        return delta.sum() + 1e-9 * (1.001 - delta).log().sum()

    la.optimize_prior(objective=bounded)
    assert torch.equal(la.prior_precision, before)
    assert "not finite" in caplog.text


def test_a_round_of_an_objective_that_is_no_number_is_refused():
    case = build("mlp-tanh")
    tuner = MarglikTuner(
        case.model, case.likelihood, 7, objective=lambda p: p.log_marginal_likelihood * torch.nan
    )
    before = tuner.hyperparameters()["prior_precision"]
    with pytest.raises(InvalidValue, match="objective"):
        tuner.step(case.batches)
    assert torch.equal(tuner.hyperparameters()["prior_precision"], before)
    assert not tuner.history and bool(torch.isfinite(tuner.loss(case.model(case.x), case.y)))
