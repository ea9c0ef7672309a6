"""Rounds over other numbers of data: each is said once, and none wins over the others."""

from __future__ import annotations

import pytest
import torch
from cases import build

from kfac_laplace import MarglikTuner
from kfac_laplace.marglik.record import best_of

#: Steps so small that δ stays what it was.
STILL = {"n_hypersteps": 1, "lr_hyp": 1e-40}


def loaders(sizes):
    case = build("mlp-tanh")
    x, y = torch.cat([case.x] * 3), torch.cat([case.y] * 3)
    return case, [[(x[:n], y[:n])] for n in sizes]


def said(caplog):
    return [record.args[0] for record in caplog.records if "n_data" in record.getMessage()]


@pytest.mark.parametrize(
    ("sizes", "warned"),
    [
        ((7, 7, 7), []),
        ((7, 5, 7, 5, 6), [5, 6]),
        ((5, 5, 5), [5]),
        ((6, 7, 9, 9), [6, 9]),
        ((7, 14, 3), [14, 3]),
    ],
)
def test_each_other_size_is_said_once(sizes, warned, caplog):
    case, given = loaders(sizes)
    tuner = MarglikTuner(case.model, case.likelihood, 7, **STILL)
    for loader in given:
        tuner.step(loader)
    assert said(caplog) == warned
    assert [record.n_data for record in tuner.history] == list(sizes)


@pytest.mark.parametrize(
    ("sizes", "best"),
    [
        ((7, 3, 7), 0),  # a part of the data has the larger evidence
        ((3, 7, 3), 1),
        ((3, 3, 5, 5), 0),  # none as promised: those of the first
        ((3, 2, 1), 0),
        ((7, 14), 0),
    ],
)
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_best_round_is_one_over_all_the_data(sizes, best, structure):
    """At fixed weights and δ the evidence of fewer examples is larger: it says nothing."""
    case, given = loaders(sizes)
    tuner = MarglikTuner(case.model, case.likelihood, 7, hessian_structure=structure, **STILL)
    for loader in given:
        tuner.step(loader)
    evidences = {r.n_data: r.evidence for r in tuner.history}
    assert sorted(evidences, key=evidences.get) == sorted(evidences, reverse=True)
    assert tuner.best is tuner.history[best]


def test_the_count_survives_a_file(caplog, tmp_path):
    """And so does what was said."""
    case, given = loaders((7, 5))
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    for loader in given:
        tuner.step(loader)
    torch.save(tuner.state_dict(), tmp_path / "tuner.pt")
    resumed = MarglikTuner(case.model, case.likelihood, 7)
    resumed.load_state_dict(torch.load(tmp_path / "tuner.pt", weights_only=True))
    assert resumed.best.evidence == tuner.best.evidence and resumed.best.n_data == 7
    resumed.step(given[1])
    assert said(caplog) == [5]


def test_nothing_to_compare():
    assert best_of([], 7) is None
