"""The memory budget: one number that changes how much is held at a time, and nothing else."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build, case
from laws import REORDERED, assert_same_blocks, dense_blocks, fitted
from peaks import peak_bytes
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.model.budget import Budget, at_once
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points

# Float64 sums, products and solves in other pieces.
TOL = {"rtol": 1e-9, "atol": 1e-11}


class Tokens(nn.Module):
    """Two tokens an example: few rows beside per-example gradients of width² entries."""

    def __init__(self, width: int, normed: bool = False):
        super().__init__()
        mix = nn.Linear(width, width)
        self.mix = weight_norm(mix) if normed else mix
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x).tanh().mean(1))


class Shifted(nn.Module):
    """A parameter that no rule covers, before a layer and a head with more outputs than inputs."""

    def __init__(self):
        super().__init__()
        self.angle = nn.Parameter(torch.randn(4))
        self.first = nn.Linear(4, 5)
        self.head = nn.Linear(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(torch.atan2(x, self.angle)).tanh())


OWN = {
    "generic and a head": lambda: case(Shifted(), (4,), "classification"),
    "head of a regression": lambda: case(Shifted(), (4,), "regression"),
    "weight norm": lambda: case(Tokens(6, normed=True), (2, 6), "classification"),
}


def named(name: str) -> Case:
    torch.manual_seed(0)
    return OWN[name]() if name in OWN else build(name)


def test_the_shares_of_the_default():
    """What was measured as fast, in entries; the rows in their own precision."""
    budget, single, double = Budget(), torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for like in (single, double):
        assert budget.gradients(like) == 2**24
        assert budget.patches(like) == 2**23
        assert budget.hessians(like) == 2**21
        assert budget.products(like) == 2**20
        assert budget.features(like) == 2**27
    assert budget.gradient_rows(single) * 4 == budget.gradient_rows(double) * 8 == 48 * 2**20


def test_shares_follow_the_number_and_one_thing_is_always_held():
    like = torch.zeros(())
    small, large = Budget(2**24), Budget(2**28)
    for share in ("gradients", "patches", "hessians", "gradient_rows", "products", "features"):
        assert getattr(large, share)(like) == 16 * getattr(small, share)(like)
        assert getattr(Budget(1), share)(like) == 0
    assert Budget(2**40).products(like) == Budget().products(like)  # those of a cache
    assert at_once(5, 0) == at_once(5, 4) == 1
    assert at_once(5, 11) == 2
    assert at_once(0, 3) == 3


def test_weight_samples_are_parted_on_demand_alone():
    """Because parts are drawn with all the others."""
    assert Budget().samples(2**40, 16) == 16
    assert Budget(8 * 100).samples(30, 16) == 3
    assert Budget(8 * 100).samples(1, 16) == 16
    assert Budget(1).samples(100, 16) == 1


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, InvalidValue), (-1, InvalidValue), (1.5, InvalidType), (True, InvalidType)],
)
def test_a_budget_is_a_whole_number_of_bytes(size, error):
    model = nn.Linear(2, 2)
    for make in (Curvature, Laplace):
        with pytest.raises(error, match="^memory_budget: "):
            make(model, "classification", memory_budget=size)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["cnn", "vit", "tokens", "twice", *OWN])
def test_a_tiny_budget_changes_no_curvature(name, structure, setting):
    options = {"hessian_structure": structure, "kfac_approx": setting}
    want = dense_blocks(fitted(named(name), **options))
    got = dense_blocks(fitted(named(name), **options, memory_budget=1))
    assert_same_blocks(got, want, REORDERED)


def posteriors(name: str, **options) -> tuple[Laplace, Laplace, Case]:
    """With the default budget, and with one byte."""
    example = named(name)
    whole, tiny = (
        Laplace(example.model, example.likelihood, memory_budget=size, **options).fit(
            example.batches
        )
        for size in (None, 1)
    )
    return whole, tiny, example


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["cnn", "vit", "tokens", "mlp-binary", *OWN])
def test_a_tiny_budget_changes_no_predictive(name, structure):
    whole, tiny, example = posteriors(name, hessian_structure=structure)
    got, want = tiny.predict(example.x), whole.predict(example.x)
    torch.testing.assert_close(got.covariance, want.covariance, **TOL)
    torch.testing.assert_close(got.mean_f, want.mean_f, **TOL)


@pytest.mark.parametrize("pred_type", ["linear", "nn"])
@pytest.mark.parametrize("name", ["cnn", "mlp-regression"])
def test_a_tiny_budget_draws_the_same_samples(name, pred_type):
    """More than are drawn together; and the generator ends where it would have ended."""
    whole, tiny, example = posteriors(name)
    found = []
    for la in (whole, tiny):
        generator = torch.Generator().manual_seed(3)
        drawn = la.functional_samples(example.x, 19, pred_type=pred_type, generator=generator)
        found.append((drawn, generator.get_state()))
    torch.testing.assert_close(found[1][0], found[0][0], **TOL)
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0].std(0).min() > 0


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["mlp-tanh", "tokens", "mlp-regression"])
def test_a_tiny_budget_changes_no_leave_one_out(name, structure):
    whole, tiny, example = posteriors(name, hessian_structure=structure)
    want, got = (
        leave_one_out_points(la.posterior, example.batches, "labels", 0) for la in (whole, tiny)
    )
    torch.testing.assert_close(got.mean, want.mean, **TOL)
    torch.testing.assert_close(got.covariance, want.covariance, **TOL)
    assert torch.equal(got.target, want.target)


@pytest.mark.parametrize("normed", [False, True])
def test_memory_falls_with_the_budget_where_gradients_are_matrices(normed):
    """A diagonal of rows squared, and one of a block that is pulled back to the parameters."""
    torch.manual_seed(0)
    width, n = 64, 96
    model = Tokens(width, normed)
    x, y = torch.randn(n, 2, width), torch.arange(n) % 3
    whole = 4 * n * width**2  # gradients of all examples, float32
    peaks = {}
    for size in (None, whole):  # an eighth for gradients, counted as float64: 6 examples at a time
        curvature = Curvature(model, "classification", hessian_structure="diag", memory_budget=size)
        peaks[size] = peak_bytes(lambda: curvature.accumulate(x, y))  # noqa: B023
    default, small = peaks.values()
    assert default > whole
    assert small < 0.5 * default
