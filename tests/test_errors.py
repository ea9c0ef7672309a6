"""The taxonomy: one root, the fitting builtins, and messages with what, where, got and remedy."""

import pytest

from kfac_laplace import KfacLaplaceError
from kfac_laplace.errors import InvalidType, InvalidValue, MissingPackage, NotFitted, UnsupportedUse


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (InvalidValue, ValueError),
        (InvalidType, TypeError),
        (NotFitted, RuntimeError),
        (UnsupportedUse, RuntimeError),
        (MissingPackage, ImportError),
    ],
)
def test_each_error_is_ours_and_a_builtin(error, builtin):
    assert issubclass(error, KfacLaplaceError) and issubclass(error, builtin)


def test_message_names_place_problem_value_and_remedy_in_this_order():
    error = InvalidValue("labels outside 0..2", where="target", got=7, remedy="Map the labels")
    assert str(error) == "target: labels outside 0..2. got 7. Map the labels."


@pytest.mark.parametrize("got", [0, False, "", []])
def test_falsy_values_are_still_told(got):
    assert f"got {got}" in str(InvalidValue("wrong", where="n", got=got))


def test_parts_left_out_leave_no_trace():
    assert str(NotFitted("not fitted")) == "not fitted."
    assert str(NotFitted("not fitted", remedy="Call fit.")) == "not fitted. Call fit."
