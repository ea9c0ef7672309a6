"""Checks that options share: names, whole numbers, positive numbers."""

import pytest
import torch

from kfac_laplace.curvature.estimate.fisher import resolve
from kfac_laplace.curvature.estimate.settings import check_kfac_approx
from kfac_laplace.curvature.gradients.groups import select_parameters
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_choice, check_positive, check_whole, unknown


def test_an_unknown_option_is_told_with_all_that_there_are():
    error = unknown("link", "logit", ("probit", "bridge"))
    assert isinstance(error, InvalidValue)
    assert str(error) == "link: unknown option. got 'logit'. Choose one of 'probit', 'bridge'."


def test_what_else_would_do_comes_last():
    error = unknown("dtype", 16, ["auto", torch.float64], or_else="pass None")
    assert str(error) == (
        "dtype: unknown option. got 16. Choose one of 'auto', torch.float64, or pass None."
    )


def test_choices_may_be_the_keys_of_a_table():
    assert "Choose one of 'a', 'b'." in str(unknown("method", "c", {"a": 1, "b": 2}))


@pytest.mark.parametrize("value", ["c", "A", "", None, 1, True, ["a"], {}, torch.zeros(2)])
def test_only_the_names_themselves_are_chosen(value):
    check_choice("method", "a", {"a": 1, "b": 2})
    with pytest.raises(InvalidValue, match=r"^method: unknown option. got .*'a', 'b'"):
        check_choice("method", value, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (
            lambda: resolve("kfac"),
            "fisher: .*'kfac'.*'exact', 'hybrid', 'mc', 'empirical', or pass",
        ),
        (
            lambda: check_kfac_approx("sum"),
            "kfac_approx: .*'sum'.*'auto', 'expand', 'reduce', or a",
        ),
        (lambda: check_kfac_approx({"*": 3}), "kfac_approx: .*got 3.*'auto', 'expand', 'reduce'"),
        (lambda: select_parameters({}, [], "some"), "subset_of_weights: .*'all', 'last_layer', or"),
    ],
    ids=["fisher", "kfac_approx", "pattern", "subset_of_weights"],
)
def test_options_of_curvature_are_told_in_full(refused, told):
    with pytest.raises(InvalidValue, match=told):
        refused()


@pytest.mark.parametrize("value", [1.0, "1", None, True, torch.tensor(1.0)])
def test_whole_numbers_are_integers(value):
    with pytest.raises(InvalidType, match="^n: not a whole number"):
        check_whole("n", value)


def test_whole_numbers_may_have_a_least_one():
    check_whole("n", -3)
    check_whole("n", 2, least=2)
    with pytest.raises(InvalidValue, match="^n: must be at least 2. got 1"):
        check_whole("n", 1, least=2)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_positive_numbers_are_above_zero_and_finite(value):
    check_positive("x", 1e-300)
    with pytest.raises(InvalidValue, match="^x: must be positive and finite"):
        check_positive("x", value)


@pytest.mark.parametrize("value", ["1", None, True, 1j])
def test_positive_numbers_are_real(value):
    with pytest.raises(InvalidType, match="^x: not a number"):
        check_positive("x", value)
