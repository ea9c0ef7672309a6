"""Options and questions out of place raise an error that names them; nothing else happens."""

import pytest
import torch
from cases import build
from torch import nn

from kfac_laplace import KfacLaplaceError, Laplace, MonteCarlo
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted, UnsupportedUse


@pytest.mark.parametrize(
    "ask",
    [
        lambda la, x: la(x),
        lambda la, x: la.predict(x),
        lambda la, x: la.sample(1),
        lambda la, x: la.functional_samples(x, 1),
        lambda la, x: la.predictive_samples(x, 1),
        lambda la, x: la.log_marginal_likelihood(),
        lambda la, x: la.log_likelihood,
        lambda la, x: la.log_det_ratio,
        lambda la, x: la.log_det_posterior_precision,
        lambda la, x: la.optimize_prior(),
        lambda la, x: la.calibrate(),
        lambda la, x: la.state_dict(),
    ],
    ids="call predict sample functional predictive evidence likelihood ratio det optimise "
    "calibrate state".split(),
)
def test_questions_before_fit(ask):
    case = build("mlp-tanh")
    with pytest.raises(NotFitted, match="fit"):
        ask(Laplace(case.model, "classification"), case.x)


BAD_OPTIONS = {
    "likelihood": ("poison", InvalidValue),
    "hessian_structure": ("krno", InvalidValue),
    "subset_of_weights": ("lastlayer", InvalidValue),
    "kfac_approx": ("expnd", InvalidValue),
    "fisher": ("exakt", InvalidValue),
    "prior_structure": ("layers", InvalidValue),
    "prior_precision": (-1.0, InvalidValue),
    "sigma_noise": (0.0, InvalidValue),
    "temperature": (0.0, InvalidValue),
    "uncovered": ("drop", InvalidValue),
    "prior_mean": (float("nan"), InvalidValue),
}
BAD_KINDS = {
    "prior_precision": "much",
    "sigma_noise": "much",
    "temperature": "hot",
    "fisher": 3,
    "likelihood": 3,
    "subset_of_weights": 3,
    "kfac_approx": 3,
    "seed": "one",
}


@pytest.mark.parametrize("name", BAD_KINDS)
def test_options_of_the_wrong_kind_name_the_option(name):
    options = {"likelihood": "regression", name: BAD_KINDS[name]}
    with pytest.raises(InvalidType, match=name):
        Laplace(build("mlp-regression").model, **options)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_out_of_range_name_the_option(name):
    value, error = BAD_OPTIONS[name]
    options = {"likelihood": "regression", name: value}
    with pytest.raises(error, match=name):
        Laplace(build("mlp-regression").model, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -2.0, 0.0])
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise"])
def test_hyperparameters_must_be_positive_and_finite(name, value):
    case = build("mlp-regression")
    la = Laplace(case.model, "regression").fit(case.batches)
    before = snapshot_regression(la)
    with pytest.raises(InvalidValue, match=name):
        la.log_marginal_likelihood(**{name: torch.tensor(value)})
    with pytest.raises(InvalidValue, match=name):
        setattr(la, name, value)
    assert snapshot_regression(la) == before


def snapshot_regression(la):
    return [
        float(la.log_marginal_likelihood()),
        la.prior_precision.detach().tolist(),
        float(la.sigma_noise),
    ]


def test_a_prior_precision_of_the_wrong_length_says_how_many_groups():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    with pytest.raises(InvalidValue, match="2"):
        la.log_marginal_likelihood(prior_precision=torch.ones(5))
    with pytest.raises(InvalidValue, match="2"):
        Laplace(case.model, "classification", prior_precision=torch.ones(5)).fit(case.batches)


def test_a_model_is_a_module():
    with pytest.raises(InvalidType, match="model"):
        Laplace(lambda x: x, "classification")


def test_a_model_without_trainable_parameters():
    model = nn.Linear(4, 3).double().requires_grad_(False)
    with pytest.raises(KfacLaplaceError):
        Laplace(model, "classification").fit(build("mlp-tanh").batches)


def test_globs_that_match_nothing():
    case = build("mlp-tanh")
    with pytest.raises(InvalidValue, match="encoder"):
        Laplace(case.model, "classification", subset_of_weights=["encoder.*"]).fit(case.batches)


def test_uncovered_parameters_can_be_an_error():
    """The message names a parameter that no layer rule covers."""
    case = build("vit")
    with pytest.raises(UnsupportedUse, match="position|norm"):
        Laplace(case.model, "classification", uncovered="error").fit(case.batches)


@pytest.mark.parametrize(
    "options",
    [{"pred_type": "gml"}, {"link_approx": "probits"}, {"link_approx": "mc", "n_samples": 0}],
)
def test_prediction_options(options):
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    with pytest.raises(InvalidValue):
        la(case.x, **options)


@pytest.mark.parametrize("count", [2.5, True, "two", None])
def test_counts_are_whole_numbers(count):
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    for ask in (la.sample, lambda n: la(case.x, n_samples=n), lambda n: MonteCarlo(samples=n)):
        with pytest.raises(InvalidType, match="whole"):
            ask(count)


def test_sample_counts():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    for ask in (la.sample, lambda n: la.functional_samples(case.x, n)):
        for n in (0, -1):
            with pytest.raises(InvalidValue):
                ask(n)


def test_sigma_belongs_to_regression():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    with pytest.raises(InvalidValue, match="sigma_noise"):
        la.log_marginal_likelihood(sigma_noise=torch.tensor(0.5))
