"""A tuner's state: what it decides, what it is compared with, and what of it is refused."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from cases import build
from marglik.small_networks import made, rows
from mutants import GONE, mutants, with_value
from torch import nn

from kfac_laplace import Curvature, MarglikTuner
from kfac_laplace.errors import InvalidValue, KfacLaplaceError
from kfac_laplace.marglik.state import LATER
from kfac_laplace.optim import KFAC
from kfac_laplace.posterior.state import BINDING, CHOSEN
from kfac_laplace.states.plain import same, sealed
from kfac_laplace.states.stored import FORMAT


def stepped(name="mlp-regression", rounds=2, **options):
    case = build(name)
    if "curvature" in options:
        options["curvature"] = options["curvature"](case.model, case.likelihood, weight_decay=0)
    tuner = MarglikTuner(case.model, case.likelihood, options.pop("n_data", 7), **options)
    for _ in range(rounds):
        tuner.step(case.batches)
    return tuner, case


def goes_on(tuner, case):
    """What a tuner says, and what comes of the next round."""
    with torch.no_grad():
        loss = tuner.loss(case.model(case.x), case.y)
    record = tuner.step(case.batches)
    return [loss, record.evidence, record.hyperparameters, record.epoch, len(tuner.history)]


#: Taken from the state.
TAKEN = {"prior_precision": 9.0, "sigma_noise": 3.0, "temperature": 2.0}
#: Compared with the state's.
COMPARED = {
    "likelihood": "studentt",
    "hessian_structure": "diag",
    "subset_of_weights": ["0.*"],
    "kfac_approx": "expand",
    "fisher": "mc",
    "prior_structure": "scalar",
    "prior_mean": 1.0,
    "joint_bias": False,
    "uncovered": "freeze",
    "fix_sigma_noise": True,
    "tune": "all",
    "objective": lambda posterior: posterior.log_marginal_likelihood,
}
#: The tuner's own, in effect from then on.
OWN = {
    "n_data": 11,
    "n_epochs_burnin": 4,
    "marglik_frequency": 2,
    "n_hypersteps": 3,
    "lr_hyp": 0.3,
    "method": "mackay",
    "loss_units": "residuals",
    "curvature": KFAC,
    "seed": 5,
    "factor_dtype": torch.float32,
    "memory_budget": 2**20,
    "forward_fn": lambda model, x: model(x),
    "batch_fn": lambda batch: batch,
    "dict_key_y": "y",
}


def test_the_tables_have_every_keyword():
    """An option more has to say which of them it is."""
    known = {*TAKEN, *COMPARED, *OWN, *BINDING, *CHOSEN}
    assert known >= inspect.signature(MarglikTuner).parameters.keys() - {"model"}


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_state_decides(name):
    tuner, case = stepped()
    other, _ = stepped(rounds=0, **{name: TAKEN[name]})
    other.load_state_dict(tuner.state_dict())
    assert same(goes_on(other, case), goes_on(tuner, case))


@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared(name):
    state = stepped()[0].state_dict()
    case = build("mlp-regression")
    options = {"likelihood": "regression", name: COMPARED[name]}
    other = MarglikTuner(case.model, n_data=7, **options)
    before = repr(other.state_dict())
    with pytest.raises(InvalidValue, match=f"{name}: the state was made with another"):
        other.load_state_dict(state)
    assert repr(other.state_dict()) == before


@pytest.mark.parametrize("name", OWN)
def test_what_stays_the_tuners_own(name):
    state = stepped()[0].state_dict()
    other, case = stepped(rounds=0, **{name: OWN[name]})
    kept = {key: getattr(other, key) for key in OWN if hasattr(other, key)}
    other.load_state_dict(state)
    assert {key: getattr(other, key) for key in kept} == kept
    assert other.options == stepped(rounds=0, **{name: OWN[name]})[0].options
    other.step(case.batches)


def test_a_state_of_adam_in_a_tuner_of_mackays_and_back():
    """MacKay's has no moments: Adam starts anew after it."""
    state = stepped()[0].state_dict()
    other, case = stepped(rounds=0, method="mackay")
    other.load_state_dict(state)
    other.step(case.batches)
    again, _ = stepped(rounds=0)
    again.load_state_dict(other.state_dict())
    again.step(case.batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_any_changed_value_is_refused_or_changes_nothing(name):
    tuner, case = stepped(name)
    state = tuner.state_dict()
    reader, _ = stepped(name, rounds=1)
    before = repr(reader.state_dict())
    refused = 0
    for path, value, changed in mutants(state, every=29):
        try:
            reader.load_state_dict(changed)
        except InvalidValue:
            refused += 1
            assert repr(reader.state_dict()) == before
        else:
            other, _ = stepped(name, rounds=0)
            other.load_state_dict(state)
            assert same(goes_on(reader, case), goes_on(other, case)), (path, value)
            reader, _ = stepped(name, rounds=1)
            before = repr(reader.state_dict())
    assert refused > 40


@pytest.mark.slow
def test_with_a_right_checksum_nothing_raw_comes_either():
    """Nor in the next round: what is taken over can be gone on from, or fails by name."""
    tuner, case = stepped()
    refused = 0
    for _, _, changed in mutants(tuner.state_dict(), every=17):
        reader, _ = stepped(rounds=0)
        try:
            reader.load_state_dict(sealed(changed))
            reader.loss(case.model(case.x), case.y)
        except KfacLaplaceError:
            refused += 1
    assert refused > 50


LATER_OF_RECORDS = ("effective_dimensions", "constant_evidence", "shared")
MOMENTS = ("adam", "state", 0)
TABLE = [
    (("adam", "state"), GONE, "state.adam: an entry is missing"),
    ((*MOMENTS, "exp_avg"), torch.zeros(5), r"exp_avg: shape \(2,\) is needed"),
    ((*MOMENTS, "exp_avg_sq"), -torch.ones(2), "means of squares are ≥ 0"),
    ((*MOMENTS, "step"), torch.tensor(float("nan")), "step: not finite"),
    (("adam", "state", 1), GONE, "moments of other hyperparameters"),
    (("adam", "param_groups", 0, "params"), [0, 1, 2], "not the hyperparameters that were tuned"),
    (("epoch",), -3, "epoch: a whole number from 0"),
    (("epoch",), 2.0, "epoch: not a whole number"),
    (("history", 0, "evidence"), "high", r"history\[0\]\.evidence: not a number"),
    (("history", 0, "scatter"), GONE, r"history\[0\]: an entry is missing"),
    (("history", 0, "hyperparameters"), {}, "no prior_precision, sigma_noise"),
    (("hyperparameters", "prior_precision"), torch.ones(5), r"shape \(5,\) is needed"),
    (("hyperparameters", "sigma_noise"), torch.tensor(-1.0), "sigma_noise: must be positive"),
    (("sharing",), "other", "another sharing"),
    (("sharing",), None, "sharing: not a string"),
    (("patterns",), {"*": 1.0}, "beside the groups"),
    (("tuned",), ["prior_precision"], "fix_sigma_noise"),
    (("objective",), "magic", "objective"),
    (("groups",), [], "groups: no group"),
    (("groups", 1), GONE, "another model"),
    (("settings", "0.weight"), "both", r"settings\.0\.weight"),
    (("settings", "0.weight"), GONE, "settings: an entry is missing"),
]


@pytest.mark.parametrize(("path", "value", "says"), TABLE, ids=lambda v: str(v)[:40])
def test_each_fault_is_told_by_its_place(path, value, says):
    tuner, _ = stepped()
    state = sealed(with_value(tuner.state_dict(), path, value))
    before = repr(tuner.state_dict())
    with pytest.raises(InvalidValue, match=says):
        tuner.load_state_dict(state)
    assert repr(tuner.state_dict()) == before


@pytest.mark.parametrize("state", [None, 3, [], {"a": 1}, torch.zeros(2), {1: 2}])
def test_what_is_no_state(state):
    with pytest.raises(InvalidValue, match="not the state of a tuner"):
        stepped()[0].load_state_dict(state)


@pytest.mark.parametrize(("number", "says"), [(FORMAT + 1, "newer"), (1, "older")])
def test_states_of_other_versions(number, says):
    tuner, _ = stepped()
    with pytest.raises(InvalidValue, match=f"{says} version"):
        tuner.load_state_dict(sealed({**tuner.state_dict(), "format": number}))


def test_a_posteriors_state_is_no_tuners(tmp_path):
    tuner, case = stepped()
    la = tuner.laplace(case.batches)
    with pytest.raises(InvalidValue):
        tuner.load_state_dict(la.state_dict())
    with pytest.raises(InvalidValue):
        la.load_state_dict(tuner.state_dict())


def test_patterns_before_the_first_batch_come_back():
    patterns = {"0.*": 2.0, "*": 3.0}
    tuner, case = stepped(rounds=0, prior_precision=patterns)
    other, _ = stepped(rounds=0)
    other.load_state_dict(copy.deepcopy(tuner.state_dict()))
    other.prepare(case.batches)
    assert other.hyperparameters()["prior_precision"].tolist() == [2.0, 3.0]


def test_states_from_before_these_entries():
    """They tuned all from the first round on, and go on so."""
    tuner, case = stepped(tune="all", n_epochs_burnin=1)
    old = {name: one for name, one in tuner.state_dict().items() if name not in LATER}
    history = [
        {name: one for name, one in record.items() if name not in LATER_OF_RECORDS}
        for record in old["history"]
    ]
    other, _ = stepped(rounds=0, tune="all", n_epochs_burnin=1)
    other.load_state_dict(sealed({**old, "history": history}))
    assert all(record.effective_dimensions.isnan().all() for record in other.history)
    assert same(goes_on(other, case), goes_on(tuner, case))


def decided(tuner, loader):
    return dict(tuner.laplace(loader).curvature.settings)


def test_settings_are_kept_once_precisions_move():
    """Evidences of rounds by other settings could not be compared."""
    x, y = rows()
    loader = [((x[:, :2], x[:, 2:]), (y % 2).double()[:, None])]
    model = made(lambda: Compared(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))))
    tuner = MarglikTuner(model, "binary", len(y), n_epochs_burnin=1)
    tuner.step(loader)
    kept = decided(tuner, loader)
    assert set(kept.values()) == {"expand"}  # gradients of the two uses cancel
    model.sign = 1.0
    assert set(Curvature(model, "binary").fit(loader).settings.values()) == {"reduce"}
    assert decided(tuner, loader) == kept
    again = MarglikTuner(model, "binary", len(y), n_epochs_burnin=1)
    assert set(decided(again, loader).values()) == {"reduce"}
    again.load_state_dict(tuner.state_dict())
    assert decided(again, loader) == kept


@pytest.mark.slow
def test_settings_are_decided_anew_when_precisions_begin_to_move():
    """Until then rounds keep those of the first, of a network that has not learned."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, 2, generator=generator, dtype=torch.float64)
    loader = [((a, b), (a.sum(1) > b.sum(1)).double()[:, None])]
    model = made(lambda: Compared(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))))
    tuner, optimizer = MarglikTuner(model, "binary", 40), torch.optim.Adam(model.parameters(), 0.02)
    model.sign, taken, moved = 1.0, [], []
    for _ in range(100):
        optimizer.zero_grad()
        tuner.loss(model(a, b), loader[0][1]).backward()
        optimizer.step()
        before = tuner.hyperparameters()["prior_precision"]
        tuner.step(loader)
        model.sign = -1.0
        taken.append(set(tuner.state_dict()["settings"].values()))
        moved.append(not torch.equal(before.expand(2), tuner.hyperparameters()["prior_precision"]))
    first = moved.index(True)
    assert 5 < first and all(moved[first:])
    assert taken[:first] == [{"reduce"}] * first
    assert all("expand" in settings for settings in taken[first:])


class Compared(nn.Module):
    """Two uses of a network, which cancel or add up."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sign = net, -1.0

    def forward(self, a, b):
        return self.net(a) + self.sign * self.net(b)
