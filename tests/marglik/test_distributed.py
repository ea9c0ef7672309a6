"""Tuning on ranks is tuning in one process with all data, and the same bits on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marglik import parted
from processes import on_ranks

# Two processes that train take half a minute to start and end.
pytestmark = pytest.mark.slow

#: Sums in another order, in float64, over six epochs of training.
ROUNDING = 1e-10


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What two ranks found."""
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), parted.base)


def assert_found(got: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """Ranks have the same bits, and what one process has."""
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[0][name], got[1][name]), name
            torch.testing.assert_close(got[0][name], value, rtol=ROUNDING, atol=ROUNDING)
        else:
            assert got[0][name] == got[1][name] == value


@pytest.mark.parametrize("kind", parted.KINDS)
def test_ranks_tune_as_one_process(kind, ranks):
    assert_found([each["tuned"][kind] for each in ranks], parted.tuned(kind, 0, 1))


def test_ranks_train_as_one_process(ranks):
    """The sampler deals the examples in turn, so that batches hold others, of the same sum."""
    assert_found([each["trained"] for each in ranks], parted.trained(0, 1))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("alone", "DistributedDataParallel"),
        ("objective", "looks at all training data"),
        ("rank 1 fails", "non-finite"),
    ],
)
def test_what_ranks_cannot_do_is_said_on_all(kind, says, ranks):
    for each in ranks:
        assert says in each["refused"][kind]
