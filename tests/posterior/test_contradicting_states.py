"""States that say something else than their reader are refused, and nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import pytest
import torch
from cases import build
from torch import Tensor

from kfac_laplace import Laplace, MarglikTuner, MonteCarlo
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.posterior.hyperparameters import Hyperparameters, Transform, row
from kfac_laplace.posterior.mackay import FixedPoint
from kfac_laplace.posterior.sharing import Sharing


@dataclass(frozen=True)
class TwoKinds(Sharing):
    """One precision for what fits a pattern, another for the rest."""

    pattern: str

    @property
    def constant_on_blocks(self) -> bool:
        return True

    def index(self, layouts) -> dict[str, Tensor]:
        return {
            name: torch.tensor(0 if fnmatchcase(name, self.pattern) else 1)
            for name in layouts.groups
        }


def fitted(**options) -> Laplace:
    case = build("vit")
    return Laplace(case.model, case.likelihood, **options).fit(case.batches)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prior_precision", 9.0),
        ("sigma_noise", 5.0),
        ("temperature", 3.0),
        ("kfac_approx", "expand"),
        ("subset_of_weights", "last_layer"),
        ("fisher", "mc"),
        ("uncovered", "error"),
        ("hessian_structure", "diag"),
        ("prior_mean", 1.0),
        ("likelihood", "regression"),
    ],
)
def test_what_a_file_holds_cannot_be_overridden(name, value, tmp_path):
    """It would be ignored, or say something else than the stored numbers."""
    la = fitted()
    la.save(tmp_path / "la.pt")
    with pytest.raises(InvalidValue, match=name):
        Laplace.load(tmp_path / "la.pt", la.model, **{name: value})


def test_a_wrong_keyword_is_none_of_the_files(tmp_path):
    la = fitted()
    la.save(tmp_path / "la.pt")
    with pytest.raises(TypeError, match="sead"):
        Laplace.load(tmp_path / "la.pt", la.model, sead=3)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 3), ("memory_budget", 2**20), ("dict_key_y", "y")]
)
def test_what_it_does_not_decide_can_be_chosen(name, value, tmp_path):
    la = fitted()
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", la.model, **{name: value})
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kfac_approx", "expand"),
        ("fisher", MonteCarlo(2)),
        ("uncovered", "freeze"),
        ("subset_of_weights", ["head.*"]),
    ],
)
def test_a_posterior_with_other_options_takes_no_state(name, value):
    la, other = fitted(), fitted(**{name: value})
    evidence = other.log_marginal_likelihood()
    with pytest.raises(InvalidValue, match=name):
        other.load_state_dict(la.state_dict())
    assert torch.equal(other.log_marginal_likelihood(), evidence)


def test_a_sharing_of_ones_own_is_told_from_another():
    """Both have two precisions, of other parameters."""
    one, other = (fitted(prior_structure=TwoKinds(p)) for p in ("head*", "patch*"))
    state, evidence = one.state_dict(), other.log_marginal_likelihood()
    with pytest.raises(InvalidValue, match="prior_structure"):
        other.load_state_dict(state)
    assert torch.equal(other.log_marginal_likelihood(), evidence)
    again = fitted(prior_structure=TwoKinds("head*"))
    again.load_state_dict(state)
    assert torch.equal(again.log_marginal_likelihood(), one.log_marginal_likelihood())


def stepped(likelihood: str = "classification", **options) -> MarglikTuner:
    case = build("mlp-tanh" if likelihood == "classification" else "mlp-regression")
    tuner = MarglikTuner(case.model, likelihood, 7, **options)
    tuner.step(case.batches)
    return tuner


@pytest.mark.parametrize(
    "options",
    [
        {"kfac_approx": "expand"},
        {"hessian_structure": "diag"},
        {"prior_structure": "scalar"},
        {"prior_structure": {"2.*": "scalar", "*": "scalar"}},
        {"prior_mean": 0.5},
        {"fisher": "mc"},
        {"likelihood": "regression"},
    ],
    ids=str,
)
def test_a_tuner_with_other_options_takes_no_state(options):
    state, other = stepped().state_dict(), stepped(**options)
    before = other.hyperparameters()
    with pytest.raises(InvalidValue):
        other.load_state_dict(state)
    for name, value in other.hyperparameters().items():
        assert torch.equal(value, before[name])


def test_a_tuner_takes_the_state_of_its_own_sharing_alone():
    one, other = (stepped(prior_structure=TwoKinds(p)) for p in ("0.*", "2.*"))
    with pytest.raises(InvalidValue, match="prior_structure"):
        other.load_state_dict(one.state_dict())
    again = stepped(prior_structure=TwoKinds("0.*"))
    again.load_state_dict(one.state_dict())
    assert len(again.history) == 1


IDENTITY = Transform(lambda value: value, lambda coordinate: coordinate)


@dataclass(frozen=True)
class WithSlope(Hyperparameters):
    """One more, which may be negative and has a start."""

    slope: Tensor = row(IDENTITY, start=torch.tensor(-1.0, dtype=torch.float64))


def test_states_hold_hyperparameters_of_any_sign():
    one = torch.ones((), dtype=torch.float64)
    stored = WithSlope(one, one, one, -2 * one).values()
    assert float(WithSlope.from_state(stored, one.device).slope) == -2.0
    del stored["slope"]  # a state of before
    assert float(WithSlope.from_state(stored, one.device).slope) == -1.0
    with pytest.raises(InvalidValue, match="sigma_noise"):
        WithSlope.from_state({**stored, "sigma_noise": -one}, one.device)


def test_mackay_refuses_what_it_would_leave_alone():
    with pytest.raises(UnsupportedUse, match="slope"):
        FixedPoint(fitted().posterior, ("prior_precision", "slope"))


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("prior_structure", {"0.*": "scalar", "2.*": "scalar"}, {"2.*": "scalar", "0.*": "scalar"}),
        ("prior_mean", {"0.*": 1.0, "*": 2.0}, {"*": 2.0, "0.*": 1.0}),
        ("kfac_approx", {"0*": "expand", "*": "reduce"}, {"*": "reduce", "0*": "expand"}),
    ],
)
def test_the_order_of_patterns_counts(name, one, other):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, **{name: one}).fit(case.batches)
    tuner = MarglikTuner(case.model, case.likelihood, 7, **{name: one})
    for reader, state in (
        (Laplace(case.model, case.likelihood, **{name: other}), la.state_dict()),
        (MarglikTuner(case.model, case.likelihood, 7, **{name: other}), tuner.state_dict()),
    ):
        with pytest.raises(InvalidValue, match=name):
            reader.load_state_dict(state)


def test_a_tuners_state_of_before_the_first_batch_forgets_the_groups():
    """A loss at precisions by pattern is refused then, as that of a fresh tuner is."""
    case = build("mlp-tanh")
    patterns = {"0.*": 2.0, "*": 3.0}
    tuner = MarglikTuner(case.model, case.likelihood, 7, prior_precision=patterns)
    state = tuner.state_dict()
    tuner.step(case.batches)
    tuner.load_state_dict(state)
    with pytest.raises(InvalidValue, match="prepare"):
        tuner.loss(case.model(case.x), case.y)


def test_what_was_given_cannot_be_written_over():
    """It would say something else than what is stored."""
    la = fitted()
    for name in ("seed", "prior_structure", "prior_mean", "likelihood"):
        with pytest.raises(AttributeError):
            setattr(la, name, getattr(la, name))


def test_a_mean_that_changes_later_is_not_the_priors():
    case = build("mlp-tanh")
    mean = torch.zeros(sum(p.numel() for p in case.model.parameters()), dtype=torch.float64)
    la = Laplace(case.model, case.likelihood, prior_mean=mean)
    mean.fill_(100.0)
    zero = Laplace(case.model, case.likelihood).fit(case.batches)
    assert torch.equal(la.fit(case.batches).scatter, zero.scatter)
