"""Predictives of models in half precision are those of the same weights in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.errors import UnsupportedUse

N, X = 40, 3
#: Outputs and inputs are rounded to so many digits, and a handful of roundings add up.
ROUNDED = {torch.float16: 2e-2, torch.bfloat16: 8e-2}
#: In float32 generators draw other numbers than in float64: averages over 30 of them differ.
OTHER_DRAWS = 0.3
TARGETS = {
    "classification": (2, lambda: torch.randint(0, 2, (N,))),
    "regression": (2, lambda: torch.randn(N, 2)),
    "binary": (1, lambda: torch.randint(0, 2, (N, 1))),
    "poisson": (1, lambda: torch.randint(0, 3, (N, 1))),
    "studentt": (1, lambda: torch.randn(N, 1)),
    "heteroscedastic": (2, lambda: torch.randn(N, 1)),
}
#: Rates e^f of a wide posterior overflow in any precision: these are kept near the data.
SPREAD = {"poisson": 1.0, "heteroscedastic": 1.0}


def pair(
    likelihood: str, dtype: torch.dtype, structure: str = "kron"
) -> tuple[Laplace, Laplace, Tensor]:
    """The posterior of a model in half precision, that of its copy in float64, and inputs."""
    torch.manual_seed(3)
    outputs, targets = TARGETS[likelihood]
    model = nn.Linear(X, outputs, dtype=dtype)
    x, y = torch.randn(N, X).to(dtype), targets()
    delta = 1.0 if likelihood in SPREAD else 1e-3
    options = {"hessian_structure": structure, "prior_precision": delta}
    double = copy.deepcopy(model).double()
    floating = y.is_floating_point()
    y = y.to(dtype) if floating else y
    la = Laplace(model, likelihood, **options).fit([(x, y)])
    exact = Laplace(double, likelihood, **options)
    exact.fit([(x.double(), y.double() if floating else y)])
    return la, exact, (SPREAD.get(likelihood, 30.0) * torch.randn(12, X)).to(dtype)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.dtype in (torch.float32, torch.float64)
    assert bool(torch.isfinite(got).all())
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max().clamp_min(1))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("pred_type", ["glm", "linear", "nn"])
@pytest.mark.parametrize("likelihood", TARGETS)
def test_predictives_are_taken_in_more_than_half_precision(likelihood, pred_type, dtype):
    la, exact, x = pair(likelihood, dtype)
    here = la.predict(x, pred_type=pred_type, n_samples=30)
    there = exact.predict(x.double(), pred_type=pred_type, n_samples=30)
    assert_near(here.mean, there.mean, ROUNDED[dtype])
    assert_near(here.covariance, there.covariance, ROUNDED[dtype])
    for ask in ("entropy", "epistemic"):
        assert_near(getattr(here, ask), getattr(there, ask), OTHER_DRAWS)
    here.distribution()


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("pred_type", ["glm", "linear", "nn"])
def test_samples_come_in_more_than_half_precision(pred_type, structure, dtype):
    la, exact, x = pair("regression", dtype, structure)
    for name in ("functional_samples", "predictive_samples"):
        got = getattr(la, name)(x, 20, pred_type=pred_type, generator=seeded())
        want = getattr(exact, name)(x.double(), 20, pred_type=pred_type, generator=seeded())
        spread = want - want.mean(0) if name == "functional_samples" else None
        assert got.dtype == torch.float32
        if spread is not None:
            assert_near(got - got.mean(0), spread, ROUNDED[dtype])
    drawn = la.sample(5, seeded())
    assert drawn.dtype == torch.float64
    assert_near(drawn, exact.sample(5, seeded()), ROUNDED[dtype])


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("pred_type", ["linear", "nn"])
def test_the_covariance_of_a_linear_model_is_that_of_its_normal_equations(pred_type, dtype):
    """(XᵀX + δ)⁻¹ by dense algebra; 300 draws give variances to within 1/√150, five times."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(X, 1, dtype=dtype), torch.randn(N, X).to(dtype), torch.randn(N, 1)
    la = Laplace(model, "regression", prior_precision=1e-3).fit([(x, y.to(dtype))])
    new = (30 * torch.randn(20, X)).to(dtype)
    rows, ones = x.double(), torch.ones(N, 1, dtype=torch.float64)
    design = torch.cat([rows, ones], 1)
    at = torch.cat([new.double(), ones[:20]], 1)
    precision = design.T @ design + 1e-3 * torch.eye(X + 1, dtype=torch.float64)
    exact = (at @ torch.linalg.solve(precision, at.T)).diagonal()
    drawn = la.predict(new, pred_type=pred_type, n_samples=300).covariance[:, 0, 0]
    assert bool(((drawn / exact - 1).abs() < 5 / 150**0.5).all())
    assert bool((la.predict(new, pred_type=pred_type).entropy > 0).all())


def test_changes_beyond_the_range_of_half_precision():
    """Values end at 65504: the changes are linear in the weights all the same."""
    torch.manual_seed(0)
    model = nn.Linear(X, 1, dtype=torch.float16)
    x, y = torch.randn(2, X).half(), torch.randn(2, 1).half()
    la = Laplace(model, "regression", prior_precision=1e-7).fit([(x, y)])
    exact = Laplace(copy.deepcopy(model).double(), "regression", prior_precision=1e-7)
    exact.fit([(x.double(), y.double())])
    new = (30 * torch.randn(20, X)).half()
    want = exact.predict(new.double(), pred_type="linear").covariance
    assert float(want.max()) > 65504**2
    assert_near(la.predict(new, pred_type="linear").covariance, want, ROUNDED[torch.float16])


@pytest.mark.parametrize("pred_type", ["linear", "nn"])
def test_under_autocast(pred_type):
    """Outputs in bfloat16 of a model in float32."""
    torch.manual_seed(0)
    model, x = nn.Linear(X, 2), torch.randn(N, X)
    la = Laplace(model).fit([(x, torch.arange(N) % 2)])
    want = la.predict(x, pred_type=pred_type)
    with torch.autocast("cpu"):
        got = la.predict(x, pred_type=pred_type)
    assert_near(got.covariance, want.covariance, ROUNDED[torch.bfloat16])
    assert_near(got.probs, want.probs, ROUNDED[torch.bfloat16])


class Product(torch.autograd.Function):
    """x Wᵀ without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad.mm(weight), grad.t().mm(x)


class SetUp(Product):
    """The same with a context that is set up apart."""

    @staticmethod
    def forward(x, weight):
        return x.mm(weight.t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class Whole(SetUp):
    """The same with the derivative."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx, dweight):
        x, weight = ctx.saved_tensors
        change = x.mm(dweight.t())
        return change if dx is None else change + dx.mm(weight.t())


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(2, X)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.weight)


@pytest.mark.parametrize("function", [Product, SetUp])
def test_linearised_samples_without_a_forward_mode_derivative_name_the_remedy(function):
    torch.manual_seed(0)
    x = torch.randn(N, X)
    la = Laplace(Custom(function)).fit([(x, torch.arange(N) % 2)])
    for ask in (lambda: la(x, pred_type="linear"), lambda: la.functional_samples(x, 2)):
        with pytest.raises(UnsupportedUse, match="pred_type.*forward-mode.*jvp.*'nn'.*'mc'"):
            ask()
    la(x, pred_type="nn", n_samples=2)
    la(x, link_approx="mc", n_samples=2)


def test_linearised_samples_by_the_functions_own_derivative():
    torch.manual_seed(0)
    x, y = torch.randn(N, X).double(), torch.arange(N) % 2
    model = Custom(Whole).double()
    plain = nn.Linear(X, 2, bias=False).double()
    plain.weight = nn.Parameter(model.weight.detach().clone())
    got = Laplace(model, hessian_structure="full").fit([(x, y)]).functional_samples(x, 3)
    want = Laplace(plain, hessian_structure="full").fit([(x, y)]).functional_samples(x, 3)
    torch.testing.assert_close(got, want)
