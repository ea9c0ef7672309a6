"""Kinds of models, inputs and autograd contexts: whatever the caller does around the posterior."""

import pytest
import torch
from cases import build
from laws import Untouched
from posterior import dense
from torch import nn

from kfac_laplace import Laplace, MarglikTuner

STRUCTURES = ("kron", "diag", "full", "lowrank")
everywhere = pytest.mark.parametrize("structure", STRUCTURES)
PREDICTIONS = ({}, {"pred_type": "linear", "n_samples": 3}, {"pred_type": "nn", "n_samples": 3})


@everywhere
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_predicting_under_no_grad_and_inference_mode(structure, context):
    """As evaluation loops do; the inputs are then inference tensors themselves."""
    la, case = dense.fit("vit", hessian_structure=structure)
    expected = [la(case.x, **options) for options in PREDICTIONS]
    with context():
        x = case.x.clone()
        got = [la(x, **options) for options in PREDICTIONS]
    for have, want in zip(got, expected, strict=True):
        assert torch.equal(have, want)


@everywhere
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fitting_and_tuning_under_no_grad_and_inference_mode(structure, context):
    """Gradients that the library needs are its own affair."""
    case = build("mlp-tanh")
    options = {"hessian_structure": structure}
    expected = Laplace(case.model, "classification", **options).fit(case.batches).optimize_prior()
    with context():
        got = Laplace(case.model, "classification", **options).fit(case.batches).optimize_prior()
        MarglikTuner(case.model, "classification", 7, **options).step(case.batches)
        got.calibrate()
    assert torch.equal(got.log_det_ratio.detach(), expected.log_det_ratio.detach())
    assert got(case.x).shape == (7, 3)


@everywhere
def test_what_was_fitted_in_inference_mode_has_gradients_outside(structure):
    case = build("mlp-tanh")
    with torch.inference_mode():
        la = Laplace(case.model, hessian_structure=structure).fit(case.batches)
    x = case.x.clone().requires_grad_()
    la(x, link_approx="probit", enable_backprop=True)[:, 0].sum().backward()
    assert bool(x.grad.any())


@everywhere
def test_predictions_are_at_the_weights_of_the_fit(structure):
    """Training on after `fit` does not move a posterior in use."""
    la, case = dense.fit("mlp-tanh", hessian_structure=structure)
    expected = [la(case.x, **options) for options in PREDICTIONS]
    with torch.no_grad():
        case.model[0].weight.mul_(2)
    photo = Untouched(case.model)
    for options, want in zip(PREDICTIONS, expected, strict=True):
        assert torch.equal(la(case.x, **options), want)
    photo.check()


@everywhere
def test_batch_norm_and_dropout_are_in_eval_mode(structure):
    """Running statistics and the training flag survive; predictions repeat exactly."""
    case = build("mlp-tanh")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()
    model(case.x)  # some running statistics
    photo = Untouched(model)
    la = Laplace(model, "classification", hessian_structure=structure).fit(case.batches)
    for options in PREDICTIONS:
        assert torch.equal(la(case.x, **options), la(case.x, **options))
    photo.check()
    evaluated = Laplace(model.eval(), "classification", hessian_structure=structure)
    evaluated.fit(case.batches)
    assert torch.equal(evaluated.log_det_ratio, la.log_det_ratio)


class Product(nn.Module):
    """Takes two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, z):
        return self.first(x).tanh() * self.second(z)


def test_inputs_of_several_tensors():
    """A sequence goes in by position, a mapping by keyword; both are the same posterior."""
    case = build("mlp-tanh")
    torch.manual_seed(0)
    model, x, z, y = Product().double(), case.x, case.x.flip(0), case.y
    by_position = Laplace(model, "classification").fit([((x, z), y)])
    by_name = Laplace(model, "classification").fit([{"x": x, "z": z, "labels": y}])
    assert torch.equal(by_position.log_det_ratio, by_name.log_det_ratio)
    assert torch.equal(by_position((x, z)), by_name({"x": x, "z": z}))
    assert by_position((x, z), pred_type="nn").shape == (7, 3)
    assert by_position.functional_samples((x, z), 2).shape == (2, 7, 3)


@everywhere
def test_pixel_outputs_in_torchs_own_layout(structure):
    """(n, c, h, w) logits with (n, h, w) labels: probabilities keep that shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
    x, y = torch.randn(5, 1, 3, 3).double(), torch.randint(2, (5, 3, 3))
    la = Laplace(model, "classification", hessian_structure=structure).fit([(x, y)])
    assert set(la.curvature.settings.values()) == {"expand"}
    for options in PREDICTIONS:
        probs = la(x, **options)
        assert probs.shape == (5, 2, 3, 3)
        torch.testing.assert_close(probs.sum(1), torch.ones(5, 3, 3).double())
    samples = la.predictive_samples(x, 2)
    assert samples.shape == (2, 5, 2, 3, 3)
    torch.testing.assert_close(samples.sum(2), torch.ones(2, 5, 3, 3).double())
    predictive = la.predict(x)
    logits_at_mode = model(x).detach().movedim(1, -1).flatten(1, 2)
    torch.testing.assert_close(predictive.mean_f, logits_at_mode)
    assert predictive.covariance.shape == (5, 9, 2, 2)
    assert predictive.entropy.shape == predictive.epistemic.shape == (5,)


@pytest.mark.parametrize("likelihood", ["regression", "binary"])
def test_one_output_without_an_axis_of_its_own(likelihood):
    """(n,) outputs and targets are (n, 1) ones."""

    class Scalar(nn.Module):
        def __init__(self, column):
            super().__init__()
            self.linear, self.column = nn.Linear(4, 1), column

        def forward(self, x):
            f = self.linear(x)
            return f if self.column else f[:, 0]

    torch.manual_seed(0)
    flat, column = Scalar(False).double(), Scalar(True).double()
    column.load_state_dict(flat.state_dict())
    x = build("mlp-tanh").x
    y = x[:, 0] if likelihood == "regression" else (x[:, 0] > 0).double()
    one = Laplace(flat, likelihood).fit([(x, y)])
    other = Laplace(column, likelihood).fit([(x, y[:, None])])
    torch.testing.assert_close(one.log_marginal_likelihood(), other.log_marginal_likelihood())
    got, expected = one(x), other(x)
    if likelihood == "regression":
        assert got[0].shape == (7, 1) and got[1].shape == (7, 1, 1)
        torch.testing.assert_close(got[1], expected[1])
        got, expected = got[0], expected[0]
    torch.testing.assert_close(got.flatten(), expected.flatten())
    tuner = MarglikTuner(flat, likelihood, 7)
    twin = MarglikTuner(column, likelihood, 7)
    torch.testing.assert_close(tuner.loss(flat(x), y), twin.loss(column(x), y[:, None]))


@everywhere
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_models_of_low_precision(structure, dtype, tolerance):
    """Evidence in float64, predictions near the float64 model's, to the digits of the dtype."""
    case = build("cnn")
    expected = Laplace(case.model, "classification", hessian_structure=structure)
    expected.fit(case.batches)
    probs = expected(case.x)
    batches = [(x.to(dtype), y) for x, y in case.batches]
    la = Laplace(case.model.to(dtype), "classification", hessian_structure=structure).fit(batches)
    evidence = la.log_marginal_likelihood()
    assert evidence.dtype == torch.float64
    torch.testing.assert_close(evidence, expected.log_marginal_likelihood(), rtol=tolerance, atol=0)
    x = case.x.to(dtype)
    torch.testing.assert_close(la(x).double(), probs, rtol=0, atol=tolerance)
    for options in PREDICTIONS[1:]:
        assert torch.isfinite(la(x, **options)).all()


def test_autocast_around_the_posterior():
    """Factors are accumulated in float32 at least."""
    case = build("mlp-tanh")
    model, batches = case.model.float(), [(x.float(), y) for x, y in case.batches]
    expected = Laplace(model, "classification").fit(batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        la = Laplace(model, "classification").fit(batches)
        probs = la(case.x.float())
    kept = {b.factors.output.dtype for b in la.curvature.blocks.values()}
    assert kept <= {torch.float32, torch.float64}
    torch.testing.assert_close(la.log_det_ratio, expected.log_det_ratio, rtol=0.02, atol=0)
    torch.testing.assert_close(probs, expected(case.x.float()), rtol=0, atol=0.02)


def test_data_parallel_wrappers_are_looked_through():
    case = build("mlp-tanh")
    wrapped = Laplace(nn.DataParallel(case.model), "classification").fit(case.batches)
    assert torch.equal(wrapped(case.x), Laplace(case.model).fit(case.batches)(case.x))


@everywhere
def test_unused_parameters_have_zero_curvature(structure):
    """In the posterior under their prior: they add nothing to the log-determinant ratio."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    case, model = build("mlp-tanh"), Partly().double()
    la = Laplace(model, "classification", hessian_structure=structure).fit(case.batches)
    alone = Laplace(model.used, "classification", hessian_structure=structure).fit(case.batches)
    torch.testing.assert_close(la.log_det_ratio, alone.log_det_ratio)
    torch.testing.assert_close(la.scatter, alone.scatter + 5)
    torch.testing.assert_close(la(case.x), alone(case.x))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_what_was_loaded_in_inference_mode_predicts_outside(structure, suffix, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    case = build("mlp-tanh")
    la = Laplace(case.model, hessian_structure=structure).fit(case.batches)
    la.save(tmp_path / f"la.{suffix}")
    with torch.inference_mode():
        loaded = Laplace.load(tmp_path / f"la.{suffix}", case.model)
    assert torch.equal(loaded(case.x), la(case.x))
    x = case.x.clone().requires_grad_()
    loaded(x, link_approx="probit", enable_backprop=True)[:, 0].sum().backward()
    assert bool(x.grad.any())
    loaded.optimize_prior().fit(case.batches, override=False)
