"""Bad data and models raise a clear error; model and fitted posterior stay as they were."""

import pytest
import torch
from cases import build
from laws import Untouched

from kfac_laplace import Laplace
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
    "list of labels": (lambda x, y: (x, y.tolist()), InvalidType, "target"),
    "no tensor": (lambda x, y: ("text", y), InvalidType, "tensor"),
    "triple": (lambda x, y: (x, y, y), InvalidType, "batch"),
    "no example": (lambda x, y: (x[:0], y[:0]), InvalidValue, "0 examples"),
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


@pytest.mark.parametrize("loader", [5, None])
def test_a_loader_is_iterable(loader):
    with pytest.raises(InvalidType, match="train_loader"):
        Laplace(build("mlp-tanh").model, "classification").fit(loader)


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
