"""Predictions are numbers or an error that says what to do; NaN never comes out in silence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import build
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidValue

STRUCTURES = ["kron", "diag", "full"]

PREDICTIONS: dict[str, Callable] = {
    "call": lambda la, x: la(x),
    "bridge": lambda la, x: la(x, link_approx="bridge"),
    "mc": lambda la, x: la(x, link_approx="mc"),
    "linear": lambda la, x: la(x, pred_type="linear", n_samples=3),
    "nn": lambda la, x: la(x, pred_type="nn", n_samples=3),
    "predict": lambda la, x: la.predict(x).probs,
    "functions": lambda la, x: la.functional_samples(x, 3),
    "functions of networks": lambda la, x: la.functional_samples(x, 3, pred_type="nn"),
    "targets": lambda la, x: la.predictive_samples(x, 3),
    "validation": lambda la, x: la.calibrate([(x, torch.zeros(len(x)).long())], "validation"),
    "grid": lambda la, x: la.optimize_prior(
        "gridsearch", val_loader=[(x, torch.zeros(len(x)).long())]
    ),
}


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 0] = value
    return x


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_inputs_that_make_nan(name, value, structure):
    """tanh(inf) is finite, but its derivative meets the input: the covariance is not."""
    case = build("mlp-tanh")
    la = Laplace(case.model, hessian_structure=structure).fit(case.batches)
    x = spoiled(case.x, value)
    delta, kappa = la.prior_precision.clone(), la.posterior_scale
    if math.isinf(value) and name == "call":  # the network's own, which take no covariance
        torch.testing.assert_close(PREDICTIONS[name](la, x), case.model(x).softmax(-1))
        with pytest.raises(InvalidValue, match="prediction.*not finite.*NaN"):
            la(x, link_approx="probit")
    elif math.isinf(value) and name == "functions of networks":
        assert torch.isfinite(PREDICTIONS[name](la, x)).all()  # tanh(inf) at each of the weights
    elif not (math.isinf(value) and name == "nn"):
        with pytest.raises(InvalidValue, match="prediction.*not finite.*NaN"):
            PREDICTIONS[name](la, x)
    assert torch.equal(la.prior_precision, delta) and la.posterior_scale == kappa


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_joint_and_regression(value):
    case = build("mlp-regression")
    la = Laplace(case.model, "regression").fit(case.batches)
    x = spoiled(case.x, value)
    for call in (
        lambda: la(x),
        lambda: la(x, joint=True),
        lambda: la.predict(x).distribution(),
        lambda: la.calibrate([(x, case.y)], "validation"),
    ):
        with pytest.raises(InvalidValue, match="not finite.*inputs"):
            call()
    with pytest.raises(InvalidValue, match="finite"):
        la.calibrate([(case.x, spoiled(case.y, value))], "validation")
    with pytest.raises(InvalidValue, match="finite"):
        la.optimize_prior("gridsearch", val_loader=[(case.x, spoiled(case.y, value))])


class Missing(nn.Module):
    """NaN means a missing value; a mask of -inf hides it from the softmax."""

    def __init__(self):
        super().__init__()
        self.score, self.head = nn.Linear(1, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = torch.nan_to_num(x)
        weights = (self.score(seen[..., None])[..., 0] + mask).softmax(-1)
        return self.head(weights * seen)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_inputs_that_the_model_knows_how_to_read(structure):
    """Missing values as NaN give what zeros give."""
    torch.manual_seed(0)
    model, x, y = Missing().double(), torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    x[0, 1] = x[3, 2] = 0.0
    mask = torch.zeros_like(x).masked_fill(x == 0, -torch.inf)
    read = x.masked_fill(x == 0, torch.nan)
    want = Laplace(model, hessian_structure=structure).fit([((x, mask), y)])
    la = Laplace(model, hessian_structure=structure).fit([((read, mask), y)])
    for pred_type in ("glm", "linear", "nn"):
        got = la((read, mask), pred_type=pred_type)
        torch.testing.assert_close(got, want((x, mask), pred_type=pred_type))


class Exponential(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.net = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sampled_networks_that_overflow(dtype):
    """The closed form has no weights to sample and goes on."""
    torch.manual_seed(0)
    model, x = Exponential(dtype), torch.randn(20, 3).to(dtype)
    la = Laplace(model, "regression", prior_precision=1e-6).fit([(x[:1], model(x[:1]).detach())])
    assert torch.isfinite(la(x[:1])[0]).all()
    for call in (
        lambda: la(x, pred_type="nn"),
        lambda: la.functional_samples(x, pred_type="nn"),
        lambda: la.predictive_samples(x, pred_type="nn"),
    ):
        with pytest.raises(InvalidValue, match="sampled weights.*glm.*prior_precision"):
            call()


def fitted(name: str = "mlp-regression", **options) -> tuple[Laplace, Tensor]:
    case = build(name)
    return Laplace(case.model, case.likelihood, **options).fit(case.batches), case.x


@pytest.mark.parametrize("kappa", [1e300, 1e308])
def test_scales_that_overflow(kappa):
    la, x = fitted(prior_precision=1e-12)
    la.posterior_scale = kappa
    for call in (lambda: la(x), lambda: la(x, joint=True)):
        try:
            assert all(torch.isfinite(value).all() for value in call())
        except InvalidValue as error:
            assert "posterior_scale" in str(error)
    la, x = fitted("mlp-tanh")
    la.model.float()
    la = Laplace(la.model).fit([(x.float(), torch.zeros(len(x)).long())])
    la.posterior_scale = kappa
    for call in (lambda: la(x.float()), lambda: la(x.float(), pred_type="linear")):
        with pytest.raises(InvalidValue, match="posterior_scale"):
            call()
    assert torch.isfinite(la.sample(3)).all()  # in float64 they are numbers


def test_counts_whose_mean_overflows():
    """E e^f = exp(m + v/2)."""
    torch.manual_seed(0)
    model, x = nn.Linear(2, 1).double(), 40 * torch.randn(5, 2).double()
    la = Laplace(model, "poisson", prior_precision=1e-4).fit([(x[:1] / 40, torch.ones(1, 1))])
    with pytest.raises(InvalidValue, match=r"E\[y\].*uncertain"):
        la(x)


OUT_OF_RANGE = {
    "sigma_noise": [1e-200, 1e200, 1e-320],
    "temperature": [1e-200, 1e-320, 1e200],
    "prior_precision": [1e-320, 1e-305, 1e305],
}
VALUES = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
SAYS = "too small or too large for float64"


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_hyperparameters_whose_squares_or_inverses_are_no_numbers(name, value):
    case = build("mlp-regression")
    given = {name: value}
    with pytest.raises(InvalidValue, match=f"{name}: {SAYS}.*other units"):
        Laplace(case.model, "regression", **given)
    with pytest.raises(InvalidValue, match=SAYS):
        MarglikTuner(case.model, "regression", n_data=5, **given)
    own = {"sigma_noise": "sigma_noise_init", "prior_precision": "prior_prec_init"}.get(name, name)
    with pytest.raises(InvalidValue, match=SAYS):
        marglik_training(case.model, case.batches, "regression", n_epochs=1, **{own: value})
    la, _ = fitted()
    before = la.log_marginal_likelihood().detach()
    if name != "temperature":
        with pytest.raises(InvalidValue, match=SAYS):
            setattr(la, name, value)
        with pytest.raises(InvalidValue, match=SAYS):
            la.log_marginal_likelihood(**given)
    state = la.state_dict()
    state["hyperparameters"][name] = torch.tensor(value, dtype=torch.float64)
    with pytest.raises(InvalidValue, match=SAYS):
        la.load_state_dict(state)
    assert torch.equal(la.log_marginal_likelihood(), before)


@pytest.mark.parametrize("value", [1e-90, 1e90])
@pytest.mark.parametrize("name", ["sigma_noise", "temperature", "prior_precision"])
def test_at_the_ends_of_the_range_all_is_finite(name, value):
    la, x = fitted(**{name: value})
    assert torch.isfinite(la.log_marginal_likelihood())
    for prediction in (la(x), la(x, joint=True)):
        assert all(torch.isfinite(part).all() for part in prediction)
    assert torch.isfinite(la.sample(2)).all()


def test_a_grid_that_overflows():
    la, x = fitted("mlp-tanh")
    with pytest.raises(InvalidValue, match=SAYS):
        loader = [(x, torch.zeros(len(x)).long())]
        la.optimize_prior("gridsearch", val_loader=loader, grid=[1.0, 1e-320])


@pytest.mark.parametrize("pred_type", ["linear", "nn"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e20), (torch.float64, 1e160)])
def test_samples_whose_squares_overflow(pred_type, dtype, size):
    """Their mean is finite, and their covariance would be infinite."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(9, 3, dtype=dtype)
    la = Laplace(model, "regression").fit([(x, torch.randn(9, 2, dtype=dtype))])
    with pytest.raises(InvalidValue, match="covariance of the outputs: not finite"):
        la(size * x[:2], pred_type=pred_type)
    assert torch.isfinite(la(1e3 * x[:2], pred_type=pred_type)[1]).all()


@pytest.mark.parametrize("pred_type", ["linear", "nn"])
def test_probabilities_need_no_covariance_of_samples(pred_type):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(9, 3)
    la = Laplace(model).fit([(x, torch.arange(9) % 2)])
    predictive = la.predict(1e20 * x[:2], pred_type=pred_type)
    torch.testing.assert_close(predictive.probs.sum(-1), torch.ones(2))
    with pytest.raises(InvalidValue, match="covariance of the outputs: not finite"):
        _ = predictive.covariance
