"""At which steps which sides are decomposed, and what is told of dear steps."""

import pytest
import torch
from optim.captured import capture
from torch import nn

from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.rules import EigenAdam
from kfac_laplace.optim.schedule import CHEAP, EARLY, WIDE, Schedule, affordable, phases
from kfac_laplace.optim.updates import Updates


@pytest.mark.parametrize("every", [1, 4, 10, 33])
def test_large_sides_fall_on_steps_of_about_equal_cost(every):
    """Nothing waits longer than `every`; no step costs more than the mean and one side."""
    widths = torch.randint(100, 600, (40,)).tolist()
    costs = {(f"layer {k:02}", k % 2): d**3 for k, d in enumerate(widths)}
    placed = phases(costs, every)
    loads = [sum(costs[side] for side, its in placed.items() if its == p) for p in range(every)]
    used = [load for load in loads if load]
    assert placed.keys() == costs.keys()
    assert sum(loads) == sum(costs.values())
    assert max(used) <= sum(costs.values()) / len(used) + max(costs.values())
    assert len(used) == min(every, -(-sum(costs.values()) // CHEAP), len(costs))


def test_each_side_is_due_once_in_every_steps():
    shapes = {f"layer {k}": (1, 300 + k, 200) for k in range(12)}
    schedule = Schedule(shapes, every=10, largest=4096)
    due = [schedule.due(step) for step in range(10, 20)]
    sides = [side for one in due for side in one]
    assert sorted(sides) == [(name, which) for name in sorted(shapes) for which in (0, 1)]
    assert len([one for one in due if one]) > 5
    assert due == [schedule.due(step) for step in range(20, 30)]


@pytest.mark.parametrize("every", [2, 10])
@pytest.mark.parametrize("k", [2, 4])
def test_sides_k_times_as_wide_are_due_k_times_as_late_and_as_seldom(k, every):
    """One alone, without anything to share steps with: at k times the early steps."""
    schedule = Schedule({"a": (1, 8, k * WIDE + 3)}, every=every, largest=4096)
    due = [step for step in range(1, 100) if ("a", 1) in schedule.due(step)]
    early = {k * step for step in EARLY}
    assert set(due) == early | set(range(k * every, 100, k * every))
    assert [step for step in range(1, 100) if schedule.waits(("a", 1), step)] == list(range(1, k))


def test_wide_sides_take_turns():
    """Four of one width fall on four steps, at the start and later."""
    k = 4
    schedule = Schedule({f"layer {j}": (1, 8, k * WIDE) for j in range(k)}, every=10, largest=4096)
    wide = [len([side for side in schedule.due(step) if side[1]]) for step in range(1, 200)]
    assert set(wide) == {0, 1}
    assert sum(wide[k - 1 : 2 * k - 1]) == k


@pytest.mark.parametrize(("every", "largest"), [(1, 4096), (10, 2 * WIDE - 1)])
def test_nothing_waits_where_each_step_decomposes_or_sides_are_beyond_the_largest(every, largest):
    schedule = Schedule({"a": (1, 8, 4 * WIDE)}, every=every, largest=largest)
    assert ("a", 1) in schedule.due(1)
    assert not schedule.waits(("a", 1), 1)


def test_the_dearest_step_is_that_of_all_that_are_due_together():
    shapes = {"a": (2, 300, 4), "b": (1, 5000, 2 * WIDE)}
    schedule = Schedule(shapes, every=10, largest=4096)
    # the narrow ones at step 2, with the wide one's first; 5000 is in its own coordinates
    assert schedule.dearest() == 2 * (300**3 + 4**3) + (2 * WIDE) ** 3


def test_the_dearest_side_leaves_the_others_to_the_other_steps():
    """Six that together cost as much as one: two steps, half a period apart."""
    costs = {("wide", 1): CHEAP} | {(f"layer {k}", 0): CHEAP // 6 for k in range(6)}
    placed = phases(costs, 10)
    assert placed.pop(("wide", 1)) == 0
    assert set(placed.values()) == {5}


def test_what_is_too_wide_is_told_with_the_width_that_is_not():
    """Operations are b d³ a side: 2³⁴ are those of two sides of 2048, and of nothing beside."""
    two = {"a": (1, 2048, 8), "b": (1, 8, 2048)}
    assert affordable({"a": (2, 2048, 5000)}, 1, 4096) is None
    assert affordable(two, 1, 4096) == 8
    assert affordable(two, 1, 2047) is None
    assert affordable({"a": (1, 2048, 1), "b": (2, 2047, 1)}, 1, 4096) == 2047
    assert affordable({"a": (8, 3000, 3000)}, 1, 4096) == 0
    assert affordable(two, 10, 4096) is None  # on two steps


@pytest.mark.parametrize(("width", "largest", "told"), [(2600, 4096, 1), (2600, 512, 0), (8, 9, 0)])
def test_wide_layers_are_told_of_before_anything_is_decomposed(width, largest, told, caplog):
    model = nn.Linear(width, 2)
    found = capture(model, "classification")
    model(torch.ones(2, width))
    named, estimate = dict(model.named_parameters()), Estimate(largest=largest)
    with caplog.at_level("INFO", "kfac_laplace"):
        Updates(named, EigenAdam(), estimate, {}).form(found.learned.captured)
    assert len(caplog.records) == told
    assert all("up to 2601 wide" in one.getMessage() for one in caplog.records)
    assert all("Estimate(largest=2)" in one.getMessage() for one in caplog.records)
