"""Bad input is refused with what, where, got and remedy; each error is also the fitting builtin."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build
from laws import fitted
from torch import nn

from kfac_laplace import Curvature, KfacLaplaceError, MonteCarlo
from kfac_laplace.errors import InvalidType, InvalidValue


def accumulate(name: str, x=None, y=None, **options) -> None:
    """One batch of a case with its input or target replaced."""
    example = build(name)
    first_x, first_y = example.batches[0]
    curvature = Curvature(example.model, example.likelihood, **options)
    curvature.accumulate(first_x if x is None else x, first_y if y is None else y)


def test_the_good_batch_is_accepted():
    for name in ("mlp-tanh", "mlp-regression", "mlp-binary", "tokens"):
        accumulate(name)


def test_empty_loader():
    with pytest.raises(InvalidValue, match="(?i)empty|no batch|no example|no data"):
        fitted("mlp-tanh", [])


def test_exhausted_generator():
    batches = iter(build("mlp-tanh").batches)
    list(batches)
    with pytest.raises(InvalidValue):
        fitted("mlp-tanh", batches)


def test_empty_batch():
    with pytest.raises(InvalidValue):
        accumulate("mlp-tanh", x=torch.zeros(0, 4).double(), y=torch.zeros(0).long())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary"])
def test_non_finite_input(name, value):
    x = build(name).batches[0][0].clone()
    x[1, 0] = value
    if name == "mlp-tanh" and value == float("inf"):
        # tanh(inf) is finite: the inputs themselves have to be seen
        assert torch.isfinite(build(name).model(x)).all()
    with pytest.raises(InvalidValue, match="(?i)finite"):
        accumulate(name, x=x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(value):
    example = build("mlp-tanh")
    with torch.no_grad():
        example.model[2].weight[0, 0] = value
    with pytest.raises(InvalidValue, match="(?i)finite"):
        fitted(example)


def test_non_finite_regression_target():
    y = build("mlp-regression").batches[0][1].clone()
    y[0, 0] = float("nan")
    with pytest.raises(InvalidValue, match="(?i)finite"):
        accumulate("mlp-regression", y=y)


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("mlp-tanh", torch.tensor([0.0, 1.0, 2.0])),
        ("mlp-tanh", torch.tensor([True, False, True])),
        ("mlp-regression", torch.zeros(3, 2, dtype=torch.long)),
        ("tokens", torch.zeros(3, 4)),
    ],
)
def test_wrong_target_dtype(name, y):
    with pytest.raises(InvalidType, match="(?i)target") as caught:
        accumulate(name, y=y)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, KfacLaplaceError)


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("mlp-tanh", torch.tensor([0, 1, 3])),
        ("mlp-tanh", torch.tensor([0, -1, 2])),
        ("mlp-binary", torch.tensor([[0.0], [1.0], [2.0]]).double()),
        ("mlp-binary", torch.tensor([[0.0], [-1.0], [1.0]]).double()),
    ],
)
def test_target_out_of_range(name, y):
    with pytest.raises(InvalidValue, match="(?i)target|label") as caught:
        accumulate(name, y=y)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("mlp-tanh", torch.zeros(2).long()),
        ("mlp-tanh", torch.zeros(3, 2).long()),
        ("mlp-regression", torch.zeros(3).double()),
        ("mlp-regression", torch.zeros(3, 3).double()),
        ("mlp-regression", torch.zeros(2, 2).double()),
        ("mlp-binary", torch.zeros(4).double()),
        ("tokens", torch.zeros(3).long()),
        ("tokens", torch.zeros(3, 5).long()),
    ],
)
def test_mismatched_shapes(name, y):
    with pytest.raises(InvalidValue):
        accumulate(name, y=y)


def test_binary_targets_may_be_flat_or_integer():
    """One logit: (n,) and (n, 1), floats and 0/1 integers mean the same."""
    example = build("mlp-binary")
    x, y = example.batches[0]
    want = fitted(example, [(x, y)]).blocks["0.weight"].dense()
    for target in (y.flatten(), y.long(), y.flatten().long()):
        got = fitted(example, [(x, target)]).blocks["0.weight"].dense()
        assert torch.equal(got, want)


def test_models_whose_output_is_no_tensor():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x), x

    example = build("mlp-tanh")
    with pytest.raises(InvalidType, match="(?i)output"):
        fitted(Case(Pair().double(), "classification", example.batches))


def test_models_that_lose_the_batch_axis():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x).mean(0)

    example = build("mlp-tanh")
    with pytest.raises(InvalidValue):
        fitted(Case(Mean().double(), "classification", example.batches))


def test_a_model_detached_from_its_parameters():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 3)

        def forward(self, x):
            return self.lin(x).detach()

    example = build("mlp-tanh")
    curvature_or_error(Case(Detached().double(), "classification", example.batches))


def curvature_or_error(example: Case) -> None:
    """Either a clear refusal, or zero curvature for every parameter: nothing invented."""
    try:
        curvature = fitted(example)
    except KfacLaplaceError:
        return
    assert all(block.dense().abs().max() == 0 for block in curvature.blocks.values())


def test_batches_that_are_no_pairs():
    example = build("mlp-tanh")
    with pytest.raises(KfacLaplaceError):
        fitted(example, [example.batches[0][0]])


def test_unknown_likelihood():
    model = build("mlp-tanh").model
    with pytest.raises(InvalidValue, match="weibull"):
        Curvature(model, "weibull")
    with pytest.raises(InvalidType):
        Curvature(model, 3)


def test_a_model_that_is_no_module():
    with pytest.raises(InvalidType):
        Curvature(lambda x: x, "regression")


@pytest.mark.parametrize("samples", [0, -1])
def test_monte_carlo_needs_samples(samples):
    with pytest.raises(InvalidValue):
        MonteCarlo(samples=samples)


def test_merging_curvatures_of_different_making():
    first = fitted("mlp-tanh")
    for other in (fitted("cnn"), fitted("mlp-tanh", hessian_structure="diag")):
        before = {name: block.dense().clone() for name, block in first.blocks.items()}
        with pytest.raises(KfacLaplaceError):
            first.merge(other)
        for name, block in first.blocks.items():
            assert torch.equal(block.dense(), before[name])


def test_messages_name_the_remedy():
    """What, where, got, remedy: in one message, on one line."""
    with pytest.raises(InvalidValue) as caught:
        accumulate("mlp-tanh", y=torch.tensor([0, 1, 3]))
    message = str(caught.value)
    assert "target" in message
    assert "3" in message
    assert "\n" not in message
