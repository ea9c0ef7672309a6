"""Bad input raises a clear error and changes neither the model nor a fitted posterior."""

import pytest
import torch
from cases import build
from laws import Untouched
from torch import nn

from kfac_laplace import KfacLaplaceError, Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted, UnsupportedUse

STRUCTURES = ("kron", "diag", "full")
everywhere = pytest.mark.parametrize("structure", STRUCTURES)


def nan_input(x, y):
    x = x.clone()
    x[1, 0] = torch.nan
    return x, y


def label_out_of_range(x, y):
    return x, torch.full_like(y, 3)


BAD_BATCHES = {
    "nan input": (nan_input, InvalidValue, "finite"),
    "label out of range": (label_out_of_range, InvalidValue, "label"),
    "negative label": (lambda x, y: (x, y - 100), InvalidValue, "label"),
    "float labels": (lambda x, y: (x, y.double()), InvalidType, "integer"),
    "too few labels": (lambda x, y: (x, y[:-1]), InvalidValue, "target"),
    "wrong input width": (lambda x, y: (x[:, :2], y), RuntimeError, "shapes"),  # torch's own
    "no batch": (lambda x, y: x, InvalidType, "batch"),
    "mapping without target": (lambda x, y: {"input": x}, InvalidValue, "labels"),
}
bad_batches = pytest.mark.parametrize(
    ("spoil", "error", "says"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys()
)


def snapshot(la, x):
    return [
        la.n_data,
        la.log_marginal_likelihood().detach(),
        la.log_likelihood.detach(),
        la.prior_precision.detach().clone(),
        la(x),
        la.sample(2, generator=torch.Generator().manual_seed(0)),
    ]


def assert_equal(got, expected):
    assert got[0] == expected[0]
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert torch.equal(a, b)


@everywhere
@pytest.mark.parametrize("override", [True, False])
@bad_batches
def test_a_failed_fit_leaves_the_fitted_posterior_and_the_model(
    spoil, error, says, override, structure
):
    """The bad batch comes second: the first has already been read."""
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification", hessian_structure=structure).fit(case.batches)
    before, photo = snapshot(la, case.x), Untouched(case.model)
    with pytest.raises(error, match=says):
        la.fit([case.batches[0], spoil(*case.batches[1])], override=override)
    assert_equal(snapshot(la, case.x), before)
    photo.check()


@bad_batches
def test_a_failed_first_fit_leaves_an_unfitted_posterior(spoil, error, says):
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification")
    with pytest.raises(error, match=says):
        la.fit([case.batches[0], spoil(*case.batches[1])])
    with pytest.raises(NotFitted):
        la.log_marginal_likelihood()
    la.fit(case.batches)
    expected = Laplace(case.model, "classification").fit(case.batches)
    assert torch.equal(la.log_marginal_likelihood(), expected.log_marginal_likelihood())


@everywhere
@pytest.mark.parametrize("override", [True, False])
def test_empty_loaders(structure, override):
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification", hessian_structure=structure).fit(case.batches)
    before = snapshot(la, case.x)
    with pytest.raises(InvalidValue, match="empty|no batch"):
        la.fit([], override=override)
    assert_equal(snapshot(la, case.x), before)


def test_an_exception_from_the_loader_passes_through():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    before, photo = snapshot(la, case.x), Untouched(case.model)

    def broken():
        yield case.batches[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        la.fit(broken())
    assert_equal(snapshot(la, case.x), before)
    photo.check()


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
}


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@everywhere
def test_non_finite_weights(value, structure):
    """A peer ends the whole process here."""
    case = build("mlp-tanh")
    with torch.no_grad():
        case.model[2].bias[0] = value
    with pytest.raises(InvalidValue, match="finite"):
        Laplace(case.model, "classification", hessian_structure=structure).fit(case.batches)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_non_finite_targets_or_outputs(name):
    case = build(name)
    x, y = case.batches[0]
    if name == "mlp-regression":
        y = y.clone()
        y[0, 0] = torch.inf
    else:
        x = torch.full_like(x, 1e308)
    with pytest.raises(InvalidValue, match="finite"):
        Laplace(case.model, case.likelihood).fit([(x * 1e10 if name == "mlp-tanh" else x, y)])


def test_regression_targets_never_broadcast():
    case = build("mlp-regression")
    x, y = case.batches[0]
    with pytest.raises(InvalidValue, match="target"):
        Laplace(case.model, "regression").fit([(x, y[:, :1])])


# torch.compile's own imports, and torch.jit.script itself, are deprecated uses of torch.jit.
deprecated_jit = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@deprecated_jit
def test_scripted_models_are_refused():
    model = torch.jit.script(build("mlp-tanh").model)
    with pytest.raises(UnsupportedUse, match="script"):
        Laplace(model, "classification").fit(build("mlp-tanh").batches)


@deprecated_jit
def test_compiled_models_are_unwrapped():
    """torch.compile of the whole model shares its weights: the original is used."""
    case = build("mlp-tanh")
    compiled = torch.compile(case.model)  # never called, so nothing is compiled
    la = Laplace(compiled, "classification").fit(case.batches)
    expected = Laplace(case.model, "classification").fit(case.batches)
    assert torch.equal(la.log_marginal_likelihood(), expected.log_marginal_likelihood())
    assert torch.equal(la(case.x), expected(case.x))


@deprecated_jit
def test_compiled_submodules_are_refused():
    case = build("mlp-tanh")
    case.model[0] = torch.compile(case.model[0])
    with pytest.raises(UnsupportedUse, match="compiled"):
        Laplace(case.model, "classification").fit(case.batches)


def test_parameters_on_several_devices_are_refused():
    case = build("mlp-tanh")
    case.model[2].to("meta")
    with pytest.raises(UnsupportedUse, match="devices"):
        Laplace(case.model, "classification").fit(case.batches)


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


def test_sample_counts():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    for ask in (la.sample, lambda n: la.functional_samples(case.x, n)):
        with pytest.raises(InvalidValue):
            ask(0)


def test_sigma_belongs_to_regression():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification").fit(case.batches)
    with pytest.raises(InvalidValue, match="sigma_noise"):
        la.log_marginal_likelihood(sigma_noise=torch.tensor(0.5))
