"""When bases are made anew, what becomes of failures, and that a stored table goes on."""

import io

import pytest
import torch
from optim.problems import SHAPES, factors_of

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.optim.decomposition import BasesTable
from kfac_laplace.optim.schedule import EARLY, WIDE

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


def test_wide_sides_stay_in_their_own_coordinates_until_they_are_due():
    """Then they have the same basis as ever; narrow ones have theirs from the start."""
    shapes = {"a": (1, 3, 2 * WIDE)}
    table, factors = table_of(shapes), factors_of(shapes)
    like = torch.randn(1, 3, 2 * WIDE).double()
    for step in (1, 2):
        table.update(step, factors)
        bases = table.bases("a", like)
        assert bases.left.vectors is not None
        assert (bases.right.vectors is None) == (step == 1)
        if step == 1:
            assert torch.equal(bases.right.values, factors["a"][1].diagonal(dim1=1, dim2=2))
    at_once = table_of(shapes, every=1)
    at_once.update(1, factors)
    assert torch.equal(at_once.bases("a", like).right.vectors, bases.right.vectors)


def test_a_wide_side_whose_factor_comes_late_is_decomposed_at_once():
    shapes = {"a": (1, 3, 2 * WIDE)}
    table = table_of(shapes)
    table.update(11, factors_of(shapes))
    assert table.bases("a", torch.randn(1, 3, 2 * WIDE)).right.vectors is not None
