"""A run that is stored and read again goes on bit by bit, wherever in its intervals it stood."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_laplace.errors import InvalidValue
from kfac_laplace.optim import KFAC, Damped, EigenAdam, Estimate
from kfac_laplace.states.plain import check_plain

STEPS = 13
CURVATURE = Estimate(every=3, bases_every=4)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(16, 3),
    ).to(dtype)  # fmt: skip


def steps(model, optimizer, first, last):
    for k in range(first, last):
        generator = torch.Generator().manual_seed(k)
        x = torch.randn(7, 2, 6, generator=generator).to(model[0].weight.dtype)
        y = torch.randint(0, 3, (7,), generator=generator)
        torch.manual_seed(k)  # of dropout
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def stored(*objects):
    file = io.BytesIO()
    torch.save([one.state_dict() for one in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(one, other, where="state"):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_state(a, b, f"{where}[{k}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def resumed(at, options, dtype=torch.float32):
    """A run to the end, and one that is stored and read again on the way."""
    whole = network(dtype)
    through = KFAC(whole, curvature=CURVATURE, **options)
    steps(whole, through, 0, STEPS)
    first = network(dtype)
    optimizer = KFAC(first, curvature=CURVATURE, **options)
    steps(first, optimizer, 0, at)
    weights, state = stored(first, optimizer)
    second = network(dtype)
    second.load_state_dict(weights)
    again = KFAC(second, curvature=CURVATURE, **options | {"seed": 5})
    again.load_state_dict(state)
    steps(second, again, at, STEPS)
    return whole, through, second, again


@pytest.mark.parametrize("at", range(STEPS))
def test_a_resumed_run_is_bit_equal_at_each_phase(at):
    whole, through, second, again = resumed(at, {"rule": EigenAdam()})
    assert_same_state(whole.state_dict(), second.state_dict())
    assert_same_state(through.state_dict(), again.state_dict())


@pytest.mark.parametrize("options", [{"rule": Damped()}, {"kfac_approx": "expand"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_rules_and_dtypes(options, dtype):
    whole, through, second, again = resumed(5, options, dtype)
    assert_same_state(whole.state_dict(), second.state_dict())
    assert_same_state(through.state_dict(), again.state_dict())


def test_a_state_is_plain_and_shares_no_memory():
    model = network()
    optimizer = KFAC(model, curvature=CURVATURE)
    steps(model, optimizer, 0, 3)
    state = optimizer.state_dict()
    check_plain(state)
    other = KFAC(network(), curvature=CURVATURE)
    other.load_state_dict(state)
    before = stored(other)[0]
    steps(model, optimizer, 3, 8)
    assert_same_state(before, other.state_dict())


def test_the_groups_of_the_state_count():
    """Learning rates are those that were stored, as for any optimiser of torch."""
    model = network()
    optimizer = KFAC(model, lr=0.3)
    steps(model, optimizer, 0, 1)
    other = KFAC(network(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.3


def test_states_of_others_are_refused():
    model = network()
    optimizer = KFAC(model, curvature=CURVATURE)
    with pytest.raises(InvalidValue, match="KFAC"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    steps(model, optimizer, 0, 1)
    state = optimizer.state_dict()
    wide = nn.Sequential(nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(20, 3))
    for other in (KFAC(wide), KFAC(network(), "regression")):
        with pytest.raises(InvalidValue):
            other.load_state_dict(state)


def two_groups(state):
    first, *_ = state["param_groups"]
    rest = {**first, "params": first["params"][1:]}
    state["param_groups"] = [{**first, "params": first["params"][:1]}, rest]


def fewer_parameters(state):
    state["param_groups"][0]["params"].pop()


def another_layer(state):
    state["kfac"]["learned"]["ggn"]["groups"][0]["params"] = ["nobody"]


def no_draws(state):
    state["kfac"]["generator"] = torch.zeros(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (two_groups, InvalidValue),
        (fewer_parameters, InvalidValue),
        (another_layer, InvalidValue),
        (no_draws, RuntimeError),  # torch's own
    ],
)
def test_a_refused_state_changes_nothing(damage, error):
    model = network()
    optimizer = KFAC(model, curvature=CURVATURE)
    steps(model, optimizer, 0, 2)
    before, whole = stored(optimizer)[0], network()
    other = KFAC(whole, curvature=CURVATURE)
    steps(whole, other, 0, 5)
    wrong = stored(other)[0]
    damage(wrong)
    with pytest.raises(error):
        optimizer.load_state_dict(wrong)
    assert_same_state(before, optimizer.state_dict())
    steps(model, optimizer, 2, 4)


FORMS = {
    "eigen adam": {"rule": EigenAdam()},
    "damped": {"rule": Damped()},
    "plain": {"rule": Damped(length=None)},
    "narrow": {"curvature": Estimate(largest=4)},
}


@pytest.mark.parametrize("made", FORMS)
@pytest.mark.parametrize("into", FORMS)
def test_a_state_of_another_rule_or_of_other_bases_is_refused(made, into):
    """Their moments have other names or coordinates, their bases other widths."""
    first, second = network(), network()
    optimizer, other = KFAC(first, **FORMS[made]), KFAC(second, **FORMS[into])
    steps(first, optimizer, 0, 2)
    steps(second, other, 0, 1)
    state = stored(optimizer)[0]
    if made == into:
        other.load_state_dict(state)
        assert_same_state(state, other.state_dict())
        return
    before = stored(other)[0]
    said = "largest" if {made, into} == {"eigen adam", "narrow"} else "another rule"
    with pytest.raises(InvalidValue, match=said):
        other.load_state_dict(state)
    assert_same_state(before, other.state_dict())


def test_numbers_of_a_rule_may_change():
    model = network()
    optimizer = KFAC(model, rule=Damped(1e-3))
    steps(model, optimizer, 0, 2)
    other = KFAC(model, rule=Damped(1e-2, momentum=0.5))
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer.state_dict(), other.state_dict())
