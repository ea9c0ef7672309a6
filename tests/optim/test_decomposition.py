"""When bases are made anew, what becomes of failures, and that a stored table goes on."""

import io

import pytest
import torch
from optim.captured import capture
from optim.problems import SHAPES, factors_of
from torch import nn

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.optim.decomposition import CHEAP, EARLY, BasesTable, affordable, phases
from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.rules import EigenAdam
from kfac_laplace.optim.updates import Updates

SMALL = {"a": (1, 3, 4), "b": (2, 5, 1)}


def table_of(shapes, every=5, largest=4096):
    return BasesTable(shapes, every=every, largest=largest)


def stored(table):
    return {
        (name, key): tensor.clone()
        for name, tensors in table.state_dict().items()
        for key, tensor in tensors.items()
    }


def changed(before, after):
    return {name for name, key in after if not torch.equal(before[name, key], after[name, key])}


@pytest.mark.parametrize("every", [1, 3, 10])
def test_all_are_due_early_and_small_ones_together_afterwards(every):
    table = table_of(SMALL, every)
    for step in range(1, 60):
        expected = set(SMALL) if step in EARLY or step % every == 0 else set()
        assert table.due(step) == expected


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
    table = table_of(shapes, every=10)
    due = [table.due(step) for step in range(10, 20)]
    assert set().union(*due) == set(shapes)
    assert sum(len(names) for names in due) <= 2 * len(shapes)  # each side once
    assert len([names for names in due if names]) > 5
    assert due == [table.due(step) for step in range(20, 30)]


def test_bases_stay_between_their_steps():
    table = table_of(SMALL)
    assert table.update(1, factors_of(SMALL))
    before = stored(table)
    kept = table.eigenbases(["a"], [torch.ones(1, 3, 4)])
    assert not table.update(3, factors_of(SMALL))
    assert changed(before, stored(table)) == set()
    assert table.eigenbases(["a"], [torch.ones(1, 3, 4)]) is kept
    assert table.update(5, factors_of(SMALL))
    assert changed(before, stored(table)) == set(SMALL)


def test_only_groups_with_factors_are_decomposed():
    table = table_of(SMALL)
    table.update(1, factors_of(SMALL))
    before = stored(table)
    table.update(5, {"b": factors_of(SMALL)["b"]})
    assert changed(before, stored(table)) == {"b"}


def test_a_group_gets_its_first_basis_when_its_factors_are_there():
    table, factors = table_of(SMALL), factors_of(SMALL)
    table.update(1, {"a": factors["a"]})
    like = torch.randn(2, 5, 1).double()
    assert table.bases("b", like).own
    assert table.bases("b", like).left.values.tolist() == [[1.0] * 5] * 2
    assert table.update(3, {"b": factors["b"]})
    assert table.bases("b", like).left.vectors is not None


def test_a_failure_keeps_the_old_basis_and_is_told_once(caplog):
    table, factors = table_of(SMALL, every=1), factors_of(SMALL)
    table.update(1, factors)
    before, (left, right) = stored(table), factors["a"]
    spoilt = (left, right * torch.nan)
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        table.update(2, {**factors, "a": spoilt})
        table.update(3, {"a": spoilt})
    assert changed(before, stored(table)) == set()
    (record,) = caplog.records
    assert record.getMessage().startswith("a: the right Kronecker factor")
    table.update(4, {"a": (left, 2 * right)})
    torch.testing.assert_close(
        table.bases("a", left).right.values, 2 * before["a", "right_values"], rtol=1e-12, atol=0
    )


def test_a_first_failure_leaves_own_coordinates_until_a_factor_is_sound(caplog):
    table, (left, right) = table_of(SMALL), factors_of(SMALL)["a"]
    like = torch.randn(1, 3, 4).double()
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        table.update(1, {"a": (left * torch.inf, right)})
    assert "coordinates stay the layer's own" in caplog.text
    bases = table.bases("a", like)
    assert bases.left.vectors is None
    assert bases.right.vectors is not None
    table.update(3, {"a": (left, right)})  # not due
    assert table.bases("a", like).left.vectors is not None


@pytest.mark.parametrize("which", [0, 1])
def test_factors_of_another_shape_are_refused(which):
    pair = list(factors_of(SMALL)["a"])
    pair[which] = torch.eye(7)[None]
    with pytest.raises(InvalidValue, match=r"^a: the (left|right) factor .*\(1, 7, 7\)"):
        table_of(SMALL).update(1, {"a": tuple(pair)})


def test_options_are_checked():
    with pytest.raises(InvalidValue, match="every"):
        table_of(SMALL, every=0)
    with pytest.raises(InvalidType, match="largest"):
        table_of(SMALL, largest=1.5)


@pytest.mark.parametrize("largest", [4096, 3])
def test_a_table_is_stored_as_tensors_and_read_again(largest):
    table = table_of(SHAPES, largest=largest)
    table.update(1, factors_of(SHAPES))
    buffer = io.BytesIO()
    torch.save(table.state_dict(), buffer)
    buffer.seek(0)
    again = table_of(SHAPES, largest=largest)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert stored(again).keys() == stored(table).keys()
    assert changed(stored(table), stored(again)) == set()


def test_bases_of_strange_groups_are_refused():
    table = table_of(SHAPES)
    table.update(1, factors_of(SHAPES))
    with pytest.raises(InvalidValue, match="column, first, large, row, second"):
        table_of(SMALL).load_state_dict(table.state_dict())


def test_the_dearest_side_leaves_the_others_to_the_other_steps():
    """Six that together cost as much as one: two steps, half a period apart."""
    costs = {("wide", 1): CHEAP} | {(f"layer {k}", 0): CHEAP // 6 for k in range(6)}
    placed = phases(costs, 10)
    assert placed.pop(("wide", 1)) == 0
    assert set(placed.values()) == {5}


def test_what_is_too_wide_is_told_with_the_width_that_is_not():
    """Operations are b d³ a side: 2³⁴ are those of two sides of 2048, and of nothing beside."""
    two = {"a": (1, 2048, 8), "b": (1, 8, 2048)}
    assert affordable({"a": (2, 2048, 5000)}, 4096) is None
    assert affordable(two, 4096) == 8
    assert affordable(two, 2047) is None
    assert affordable({"a": (1, 2048, 1), "b": (2, 2047, 1)}, 4096) == 2047
    assert affordable({"a": (8, 3000, 3000)}, 4096) == 0


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
