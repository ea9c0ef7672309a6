"""Several ranks train as one process does."""

from __future__ import annotations

import pytest
import torch
from optim import rank
from processes import on_ranks

#: Sums in another order, in float64, six steps, and inverses whose condition is about 1e3.
ROUNDING = 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_ranks_make_the_steps_of_one_process(fisher, by_hand, tmp_path):
    want = rank.train(0, 1, fisher)
    for got in on_ranks(2, tmp_path, rank.on_rank, fisher, by_hand):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.slow
def test_ranks_that_draw_other_labels_stay_together(tmp_path):
    """Bit by bit: their factors are the same sums."""
    first, second = on_ranks(2, tmp_path, rank.on_rank, "mc", False)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.slow
def test_the_model_inside_its_wrapper_is_enough(tmp_path):
    """As it is given before it is wrapped, or by trainers that wrap it themselves."""
    want = rank.train(0, 1, "exact")
    for got in on_ranks(2, tmp_path, rank.on_rank, "exact", False, "inside"):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.slow
def test_processes_that_are_not_known_are_told_of_once(tmp_path):
    for seen in on_ranks(2, tmp_path, rank.told):
        assert len([message for message in seen if "2 processes run" in message]) == 1
