"""Training that is stored and read again at any step, or before any round, goes on bit by bit."""

from __future__ import annotations

import io

import pytest
import torch
from bits import assert_same_bits
from marglik.stored_runs import EPOCHS, Run

MOVES = {"n_epochs_burnin": 1, "tune": "all"}
RUNS = [
    ("mlp-regression", "damped", MOVES),
    ("mlp-regression", "kfac", {**MOVES, "fisher": "mc"}),
    ("mlp-tanh", "shared", MOVES),
    ("masked", "adam", MOVES),
]
MORE = [  # longer together than a few seconds
    ("mlp-regression", "adam", MOVES),
    ("cnn", "kfac", {}),
    ("cnn", "shared", {**MOVES, "prior_structure": "scalar"}),
    ("transformer", "adam", MOVES),
    ("masked", "shared", MOVES),
    ("mlp-binary", "adam", {**MOVES, "method": "mackay"}),
    ("mlp-regression", "adam", {**MOVES, "hessian_structure": "ekfac"}),
    ("mlp-regression", "adam", {**MOVES, "hessian_structure": "lowrank", "objective": "exact"}),
    ("twice", "adam", {**MOVES, "hessian_structure": "diag", "prior_structure": "diag"}),
]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in MORE)],
    ids=str,
)
def test_stored_anywhere_a_run_ends_at_the_same_bits(name, kind, options):
    """Weights, moments, factors, hyperparameters and history; between steps and before rounds."""
    whole = Run(name, kind, options)
    states, events = [], [*whole.events()]
    for event in events:
        states.append(through_a_file(whole.state()))
        whole.do(event)
    wanted = whole.result()
    assert len(wanted[0]) == EPOCHS
    if options:
        start, end = wanted[0][0]["hyperparameters"], wanted[0][-1]["hyperparameters"]
        assert not torch.equal(start["prior_precision"], end["prior_precision"])
    for k, state in enumerate(states):
        torch.manual_seed(99)
        run = Run(name, kind, options)
        run.load(state)
        for event in events[k:]:
            run.do(event)
        assert_same_bits(run.result(), wanted, f"stored before {events[k]}")
