"""Named values: checks, the coordinates in which they are free, and a further one as one row."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kfac_laplace import Categorical, Gaussian, Laplace
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.hyperparameters import (
    LOG,
    FreeCoordinates,
    Hyperparameters,
    Transform,
    one_number,
    positive,
    real,
    row,
)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, [], [1.0, -1.0]])
def test_hyperparameters_are_positive_and_finite(value):
    with pytest.raises(InvalidValue, match="sigma"):
        positive(value, "sigma_noise")


def test_hyperparameters_are_float64_and_keep_their_graph():
    delta = torch.tensor(2.0, requires_grad=True)
    tensor = positive(delta, "prior_precision")
    assert tensor.dtype == torch.float64
    tensor.log().backward()
    torch.testing.assert_close(delta.grad, torch.tensor(0.5))


@pytest.mark.parametrize("name", ["sigma_noise", "temperature", "prior_mean"])
def test_messages_name_the_argument_they_were_called_for(name):
    with pytest.raises(InvalidValue, match=rf"^{name}: one number is needed\. got shape \(2,\)"):
        one_number(torch.ones(2), name)
    with pytest.raises(InvalidValue, match=rf"^{name}: must be finite"):
        real(torch.nan, name)


@pytest.mark.parametrize("name", ["sigma_noise", "temperature"])
def test_options_of_a_posterior_that_are_one_number_are_told_apart(name):
    with pytest.raises(InvalidValue, match=f"^{name}: one number"):
        Laplace(torch.nn.Linear(2, 1), "regression", **{name: torch.ones(2)})


def start():
    return Hyperparameters(number([0.5, 2.0]), number(0.3), number(0.7))


def test_what_is_tuned_depends_on_the_likelihood_and_on_what_is_fixed():
    """The temperature never is."""
    assert Hyperparameters.tuned(Categorical()) == ("prior_precision",)
    assert Hyperparameters.tuned(Gaussian()) == ("prior_precision", "sigma_noise")
    assert Hyperparameters.tuned(Gaussian(), ("sigma_noise",)) == ("prior_precision",)


def test_coordinates_are_logarithms_and_the_rest_stays():
    free = FreeCoordinates(start(), ("prior_precision",))
    (leaf,) = free.leaves
    torch.testing.assert_close(leaf.detach(), number([0.5, 2.0]).log())
    value = free.value()
    (value.prior_precision * number([3.0, 5.0])).sum().backward()
    torch.testing.assert_close(leaf.grad, number([0.5 * 3, 2.0 * 5]))  # d exp(u)/du = exp(u)
    assert not value.sigma_noise.requires_grad and float(value.sigma_noise) == 0.3
    assert torch.equal(value.temperature, number(0.7))


def test_names_values_and_states_derive_from_the_rows():
    hyper = start()
    assert list(hyper.values()) == ["prior_precision", "sigma_noise", "temperature"]
    assert list(hyper.named(Categorical())) == ["prior_precision"]
    assert list(hyper.named(Gaussian())) == ["prior_precision", "sigma_noise"]
    again = Hyperparameters.from_state(hyper.values(), torch.device("cpu"))
    assert all(torch.equal(again.values()[name], value) for name, value in hyper.values().items())
    with pytest.raises(KeyError, match="temperature"):
        Hyperparameters.from_state({"prior_precision": 1.0, "sigma_noise": 1.0}, "cpu")


# One row is all that a further hyperparameter needs.
@dataclass(frozen=True)
class WithSlope(Hyperparameters):
    slope: Tensor = row(Transform(lambda v: v, lambda u: u), start=number(-1.0))
    gain: Tensor = row(LOG, lambda likelihood: not likelihood.has_noise, start=number(4.0))


def test_a_further_hyperparameter_is_one_row():
    hyper = WithSlope(number(1.0), number(1.0), number(1.0))
    assert WithSlope.tuned(Gaussian()) == ("prior_precision", "sigma_noise", "slope")
    assert WithSlope.tuned(Categorical()) == ("prior_precision", "slope", "gain")
    free = FreeCoordinates(hyper, ("slope", "gain"))
    assert [leaf.item() for leaf in free.leaves] == pytest.approx([-1.0, math.log(4)])
    value = free.value()
    assert isinstance(value, WithSlope) and value.slope.requires_grad and value.gain.requires_grad
    assert float(value.detached().gain) == pytest.approx(4.0)
    assert list(hyper.named(Categorical())) == ["prior_precision", "slope", "gain"]
