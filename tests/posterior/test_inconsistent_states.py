"""States whose checksums are right and whose parts contradict one another are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import build

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import sealed


def changed(state: dict, path: tuple, value) -> dict:
    """The state with another value, sealed anew inside and outside."""
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value(place[path[-1]]) if callable(value) else value
    if "curvature" in state:
        state["curvature"] = sealed(
            {k: v for k, v in state["curvature"].items() if k != "checksum"}
        )
    return sealed({k: v for k, v in state.items() if k != "checksum"})


def negative(targets):
    return torch.cat([-targets[:1], targets[1:]])


WRONG = {
    "no data": ("n_data", 0),
    "no rows": ("n_rows", 0),
    "fewer outputs than rows": ("n_outputs", 1),
    "a list for a statistic": ("statistic", torch.ones(3, dtype=torch.float64)),
    "a column too many": ("targets", lambda t: torch.cat([t, t], 1)),
    "a row too many": ("targets", lambda t: torch.cat([t, t])),
    "sums without outputs": ("targets", lambda t: t[0]),
    "negative counts": ("targets", negative),
    "an axis too far": ("class_axis", 7),
    "rows beyond memory": ("row_entries", 2**47),
    "unused": ("unused", lambda names: ["0.weight", "0.bias"]),
}


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary"])
@pytest.mark.parametrize("kind", WRONG)
def test_parts_of_a_curvature_that_contradict_one_another(kind, name, structure):
    entry, value = WRONG[kind]
    case = build(name)
    la = Laplace(case.model, case.likelihood, hessian_structure=structure).fit(case.batches)
    state, evidence = la.state_dict(), la.log_marginal_likelihood().detach()
    la.load_state_dict(changed(state, ("posterior_scale",), lambda one: one))
    with pytest.raises(InvalidValue, match=f"ggn\\.(n_data|{entry})"):
        la.load_state_dict(changed(state, ("curvature", "ggn", entry), value))
    assert torch.equal(la.log_marginal_likelihood(), evidence)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_no_data_at_all_leave_no_curvature(structure):
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood, hessian_structure=structure)
    state = curvature.fit(case.batches).state_dict()
    for name in ("n_data", "n_rows", "n_outputs"):
        state = changed(state, ("ggn", name), 0)
    with pytest.raises(InvalidValue, match=r"n_data: blocks without data"):
        Curvature.from_state(state, case.model, curvature.options)
    curvature.ggn = curvature.ggn.scaled(0.0)
    Curvature.from_state(curvature.state_dict(), case.model, curvature.options)


class WithSpare(torch.nn.Module):
    """With a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = build("mlp-tanh").model, torch.nn.Linear(3, 2).double()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_parameters_that_are_unused_load(structure):
    torch.manual_seed(0)
    case, model = build("mlp-tanh"), WithSpare()
    la = Laplace(model, case.likelihood, hessian_structure=structure).fit(case.batches)
    assert "unused" in la.coverage.values()
    la.load_state_dict(la.state_dict())


@pytest.mark.parametrize("name", ["tokens", "tokens-regression", "vit", "cnn"])
def test_outputs_of_several_rows_load(name):
    case = build(name)
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    Laplace(case.model, case.likelihood).load_state_dict(la.state_dict())


TUNERS = {
    "a matrix to start from": (("start", 0), torch.ones(2, 2, dtype=torch.float64)),
    "nothing to start from": (("start", 0), torch.ones(0, dtype=torch.float64)),
    "a negative learning rate": (("adam", "param_groups", 0, "lr"), -0.1),
    "one beta": (("adam", "param_groups", 0, "betas"), [0.9]),
    "a beta of one": (("adam", "param_groups", 0, "betas"), [0.9, 1.0]),
    "betas of words": (("adam", "param_groups", 0, "betas"), ["a", "b"]),
    "a negative eps": (("adam", "param_groups", 0, "eps"), -1.0),
    "no evidence": (("history", 0, "evidence"), float("nan")),
    "no objective": (("history", 0, "objective"), float("nan")),
}


@pytest.mark.parametrize("kind", TUNERS)
def test_parts_of_a_tuners_state_that_are_none(kind):
    path, value = TUNERS[kind]
    case = build("mlp-regression")
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    tuner.step(case.batches)
    state = tuner.state_dict()
    tuner.load_state_dict(changed(state, ("epoch",), lambda one: one))
    with pytest.raises(InvalidValue, match=r"state\.|prior_precision"):
        tuner.load_state_dict(changed(state, path, value))
    assert len(tuner.history) == 1
