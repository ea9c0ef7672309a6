"""A posterior by a curvature that is there: fitted, merged, loaded, or an optimiser's."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import build
from optim.captured import calm, negative_log_likelihood

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue, NotFitted, UnsupportedUse
from kfac_laplace.optim import KFAC, Estimate

#: Those of the prior and of what is done with the posterior: all else is the curvature's.
OWN = {
    "prior_precision": 3.0,
    "prior_structure": "scalar",
    "prior_mean": 0.1,
    "sigma_noise": 0.5,
    "temperature": 2.0,
    "dict_key_y": "y",
    "forward_fn": lambda model, x: 2 * model(x),
    "batch_fn": lambda batch: (batch[0], batch[1]),
}


def averaged(example, epochs=1):
    """An optimiser after an epoch at learning rate 0, with plain averages."""
    model = calm(example.model)
    estimate = Estimate("exact", every=1, ema=1)
    optimizer = KFAC(model, example.likelihood, lr=0.0, weight_decay=0, curvature=estimate)
    for x, y in epochs * example.batches:
        optimizer.zero_grad()
        (negative_log_likelihood(example.likelihood, model(x), y) / len(x)).backward()
        optimizer.step()
    model.eval()
    return optimizer


def predicted(la, x):
    """Means, and covariances of the linearised posterior, which the curvature makes."""
    link = "auto" if la.likelihood.has_noise else "probit"
    found = la.predict(x, link_approx=link)
    return found.mean, found.covariance


def assert_alike(got, want, x):
    assert torch.equal(got.log_det_ratio, want.log_det_ratio)
    assert torch.equal(got.log_marginal_likelihood(), want.log_marginal_likelihood())
    pairs = zip(predicted(got, x), predicted(want, x), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(got.sample(2), want.sample(2))
    assert got.coverage == want.coverage and got.options == want.options


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["mlp-regression", "vit", "mlp-binary"])
def test_a_fitted_curvature_is_the_fit_of_its_data(name, structure):
    case = build(name)
    curvature = Curvature(case.model, case.likelihood, hessian_structure=structure)
    curvature.fit(case.batches)
    got = Laplace.from_curvature(curvature, case.model, prior_precision=2.0)
    want = Laplace(
        case.model, case.likelihood, hessian_structure=structure, prior_precision=2.0
    ).fit(case.batches)
    assert_alike(got, want, case.x)


def test_a_merged_and_a_loaded_curvature():
    case = build("mlp-tanh")
    parts = [Curvature(case.model, case.likelihood).fit([batch]) for batch in case.batches]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    want = Laplace(case.model, case.likelihood).fit(case.batches)
    got = Laplace.from_curvature(merged, case.model)
    torch.testing.assert_close(got.log_marginal_likelihood(), want.log_marginal_likelihood())
    state = merged.state_dict()
    loaded = Curvature.from_state(state, case.model, merged.options)
    assert_alike(Laplace.from_curvature(loaded, case.model), got, case.x)


@pytest.mark.parametrize("name", OWN)
def test_options_of_the_prior_are_in_effect(name):
    case = build("mlp-regression")
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    options = {name: OWN[name]}
    got = Laplace.from_curvature(curvature, case.model, **options)
    want = Laplace(case.model, case.likelihood, **options)
    assert got._plain_options() == want._plain_options()
    for value in ("sigma_noise", "temperature"):
        assert torch.equal(getattr(got, value), getattr(want, value))
    assert bool((got.prior_precision == options.get("prior_precision", 1.0)).all())


def test_every_option_of_laplace_is_here_or_the_curvatures():
    keywords = inspect.signature(Laplace.from_curvature).parameters.keys()
    assert {*OWN} == keywords - {"curvature", "model"}
    curvatures = set(inspect.signature(CurvatureOptions).parameters)
    spellings = {"subnetwork_indices", "subnetwork_mask"}  # of subset_of_weights
    assert {*inspect.signature(Laplace).parameters} <= {*OWN, *curvatures, *spellings, "model"}


def test_patterns_set_precisions():
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    la = Laplace.from_curvature(curvature, case.model, prior_precision={"0.*": 2.0, "*": 3.0})
    assert la.prior_precision.tolist() == [2.0, 3.0]


def test_the_curvature_is_not_changed():
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    before = curvature.ggn
    la = Laplace.from_curvature(curvature, case.model)
    la.fit(case.batches, override=False)
    assert curvature.ggn is before and (curvature.n_data, la.n_data) == (7, 14)


@pytest.mark.parametrize("name", ["mlp-tanh", "vit", "mlp-regression"])
def test_an_optimisers_curvature_is_that_of_a_fit_of_its_layers(name, tmp_path):
    """At learning rate 0, plain averages and exact vectors; norms stay at their values."""
    case = build(name)
    n = len(case.x)
    la = Laplace.from_curvature(averaged(case).curvature(n), case.model, prior_precision=2.0)
    params = list(la.posterior.mode)
    want = Laplace(case.model, case.likelihood, subset_of_weights=params, prior_precision=2.0).fit(
        case.batches
    )
    torch.testing.assert_close(la.log_det_ratio, want.log_det_ratio, rtol=1e-10, atol=0)
    for one, other in zip(predicted(la, case.x), predicted(want, case.x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert la.sample(2).shape == want.sample(2).shape
    others = {name for name, how in la.coverage.items() if how == "frozen"}
    assert others == {name for name, _ in case.model.named_parameters()} - {*params}
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", case.model)
    assert torch.equal(again.log_det_ratio, la.log_det_ratio)


def test_no_evidence_is_made_up():
    case = build("mlp-tanh")
    la = Laplace.from_curvature(averaged(case).curvature(7), case.model)
    for ask in (
        la.log_marginal_likelihood,
        la.optimize_prior,
        lambda: la.log_likelihood,
        lambda: la.evidence(loader=case.batches),
        lambda: la.evidence("kron"),
    ):
        with pytest.raises(NotFitted, match=r"without the log-likelihood.*Call fit\(train_loader"):
            ask()
    assert "log det ratio" in la.summary() and "likelihood" not in la.summary()
    assert bool(la.fit(case.batches).log_marginal_likelihood().isfinite())


def test_data_are_not_added_to_what_came_without_their_log_likelihood():
    """Such a sum would hold the averaged data twice; a fit afresh is that of the data."""
    example = build("mlp-tanh")
    la = Laplace.from_curvature(averaged(example).curvature(7), example.model)
    before = la.log_det_ratio
    with pytest.raises(UnsupportedUse, match=r"Call fit\(train_loader\) over all data"):
        la.fit(example.batches, override=False)
    assert torch.equal(la.log_det_ratio, before)
    la.fit(example.batches)
    want = Laplace(example.model, example.likelihood, **la.options.keywords()).fit(example.batches)
    assert torch.equal(la.log_marginal_likelihood(), want.log_marginal_likelihood())


def test_another_model_or_no_data():
    case = build("mlp-tanh")
    with pytest.raises(NotFitted, match="a posterior needs data"):
        Laplace.from_curvature(Curvature(case.model, case.likelihood), case.model)
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    with pytest.raises(InvalidValue, match="no longer in the model"):
        Laplace.from_curvature(curvature, build("vit").model)
