"""Keywords of laplace-torch that mean nothing here, and what takes their place."""

from __future__ import annotations

import inspect
from enum import Enum

import pytest
import torch
from cases import build

from kfac_laplace import Laplace, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.migration import refused


class Structure(str, Enum):
    """As laplace-torch's enumerations are."""

    GP = "gp"


def fitted(name="mlp-regression", **options):
    case = build(name)
    return Laplace(case.model, case.likelihood, **options).fit(case.batches), case


def asked(words, ask):
    """Each word of a table, in a call."""
    return [pytest.param(word, ask, id=f"{ask.__name__}-{word}") for word in words]


def construct(case, **word):
    Laplace(case.model, case.likelihood, **word)


def train(case, **word):
    marglik_training(case.model, case.batches, case.likelihood, n_epochs=1, **word)


def fit(case, **word):
    Laplace(case.model, case.likelihood).fit(case.batches, **word)


def call(case, **word):
    fitted()[0](case.x, **word)


def functions(case, **word):
    fitted()[0].functional_samples(case.x, **word)


def targets(case, **word):
    fitted()[0].predictive_samples(case.x, **word)


def search(case, **word):
    fitted()[0].optimize_prior_precision(**word)


@pytest.mark.parametrize(
    ("word", "ask"),
    [
        *asked(refused.CONSTRUCTOR, construct),
        *asked(refused.TRAINING, train),
        *asked(refused.FIT, fit),
        *asked(refused.CALL, call),
        *asked(refused.DRAWS, functions),
        *asked(refused.DRAWS, targets),
        *asked(refused.SEARCH, search),
    ],
)
def test_the_error_names_the_word_and_a_remedy(word, ask):
    with pytest.raises(InvalidType, match=rf"^{word}: .*got Laplace\. (Leave|Write|Take) "):
        ask(build("mlp-regression"), **{word: Laplace})


def test_their_keywords_are_none_of_ours():
    """What a table refuses, no signature has."""
    for words, taker in [
        (refused.CONSTRUCTOR, Laplace.__init__),
        (refused.TRAINING, marglik_training),
        (refused.FIT, Laplace.fit),
        (refused.CALL, Laplace.__call__),
        (refused.DRAWS, Laplace.functional_samples),
        (refused.DRAWS, Laplace.predictive_samples),
        (refused.SEARCH, Laplace.optimize_prior_precision),
    ]:
        taken = taker.__wrapped__.__code__.co_varnames
        assert not set(words) & set(taken)


@pytest.mark.parametrize("structure", ["gp", Structure.GP])
@pytest.mark.parametrize("more", [{}, {"n_subset": 5}, {"functional_approximation": "nystrom"}])
def test_a_posterior_over_functions(structure, more):
    """Told before the words that belong to it."""
    case = build("mlp-regression")
    for make in (
        lambda **o: Laplace(case.model, "regression", **o),
        lambda **o: marglik_training(case.model, case.batches, "regression", **o),
    ):
        with pytest.raises(InvalidValue, match=r"^hessian_structure: .*got 'gp'.*LowRank"):
            make(hessian_structure=structure, **more)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_draws_of_functions_have_gradients(pred_type):
    """Of the same functions: gradients are slopes between neighbouring inputs."""
    la, case = fitted()
    x = case.x[:3].clone().requires_grad_()

    def at(x, **graph):
        source = torch.Generator().manual_seed(1)
        return la.functional_samples(x, pred_type, 2, generator=source, **graph)

    found = at(x, enable_backprop=True)
    torch.testing.assert_close(found.detach(), at(x.detach()))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    step = torch.zeros_like(gradient)
    step[1, 2] = 1e-5
    slope = (at(x.detach() + step) - at(x.detach() - step)).sum() / 2e-5
    torch.testing.assert_close(gradient[1, 2], slope, rtol=1e-6, atol=1e-8)


def test_inputs_that_ask_for_gradients_in_vain(caplog):
    """A warning, once; none where nothing is asked, or gradients are off."""
    la, case = fitted()
    x = case.x.clone().requires_grad_()
    la(case.x)
    with torch.no_grad():
        la(x)
    la(x, enable_backprop=True)
    assert caplog.text == ""
    for ask in (la, la.predict, la.functional_samples, lambda x: la(x, joint=True)):
        ask(x)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "pass it to one of these" in caplog.text and "enable_backprop=True" in caplog.text


def test_words_that_carry_gradients_are_those_that_are_named(caplog):
    """Whichever call was made: not each of them takes the keyword."""
    la, case = fitted()
    x = case.x.clone().requires_grad_()
    la.predictive_samples(x, 2)
    for word, mean in {
        "la(x)": la(x, enable_backprop=True)[0],
        "predict": la.predict(x, enable_backprop=True).mean,
        "functional_samples": la.functional_samples(x, 2, enable_backprop=True),
    }.items():
        assert word in caplog.text and mean.requires_grad
    verbs = [name for name in dir(Laplace) if not name.startswith("_")]
    takers = [
        name
        for name in verbs
        if callable(getattr(Laplace, name))
        and "enable_backprop" in inspect.signature(getattr(Laplace, name)).parameters
    ]
    assert takers == ["functional_samples", "predict"]


@pytest.mark.parametrize("name", ["mlp-regression", "mlp-tanh"])
def test_moments_of_the_outputs(name):
    """Those that predictions are made of, κ and τ included."""
    la, case = fitted(name)
    la.posterior_scale = 0.4
    mean, covariance = la.predictive_moments(case.x)
    torch.testing.assert_close(mean, case.model(case.x).detach())
    torch.testing.assert_close(covariance, la.predict(case.x).covariance)
    if name == "mlp-regression":
        for found, expected in zip(
            la.predictive_moments(case.x, joint=True), la(case.x, joint=True), strict=True
        ):
            assert torch.equal(found, expected)


def test_a_precision_for_each_parameter_needs_its_structure():
    """As laplace-torch's users hand the last posterior on; other lengths are told as before."""
    la, case = fitted("mlp-tanh", hessian_structure="diag")
    given = {"hessian_structure": "diag", "prior_mean": la.mean}
    given["prior_precision"] = la.posterior_precision
    with pytest.raises(InvalidValue, match="prior_structure='diag' has one for each parameter"):
        Laplace(case.model, **given).fit(case.batches)
    again = Laplace(case.model, prior_structure="diag", **given).fit(case.batches)
    assert torch.equal(again.prior_precision_diag, la.posterior_precision)
    with pytest.raises(InvalidValue, match="one for each entry of that structure.$"):
        la.prior_precision = torch.ones(5)
