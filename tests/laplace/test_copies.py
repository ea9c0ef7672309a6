"""Posteriors are copied and pickled whatever loader they were fitted from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import build
from torch.utils.data import DataLoader

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.curvature.layers import registry
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue


def pickled(value):
    return pickle.loads(pickle.dumps(value))


LOADERS = {
    "generator": lambda case: (batch for batch in case.batches),
    "list": lambda case: case.batches,
    "collating": lambda case: DataLoader(
        [*zip(case.x, case.y, strict=True)],
        batch_size=3,
        generator=torch.Generator(),
        collate_fn=lambda rows: tuple(torch.stack(column) for column in zip(*rows, strict=True)),
    ),
}
copies = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])


@copies
@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("kind", LOADERS)
def test_copies_say_the_same(kind, structure, copied):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, hessian_structure=structure)
    la.fit(LOADERS[kind](case)).fit(LOADERS[kind](case), override=False)
    la.optimize_prior()
    again = copied(la)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    link = {"link_approx": "probit"}
    assert torch.equal(again(case.x, **link), la(case.x, **link))
    again.prior_precision = 100.0
    assert not torch.equal(again(case.x, **link), la(case.x, **link))


def test_copies_share_the_loaders_and_pickles_have_none():
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    expected = copy.deepcopy(la).calibrate().posterior_scale
    left = pickled(la)
    with pytest.raises(InvalidValue, match=r"no data to calibrate on.*Pass the loader"):
        left.calibrate()
    assert torch.equal(left.calibrate(case.batches).posterior_scale, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_generator_is_read_once_here_as_there(copied):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(batch for batch in case.batches)
    for each in (la, copied(la)):
        with pytest.raises(InvalidValue, match="loader"):
            each.calibrate()


@copies
def test_tuners(copied):
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    tuner.loss(case.model(case.x), case.y)
    tuner.step(batch for batch in case.batches)
    again = copied(tuner)
    assert torch.equal(
        again.loss(again.model(case.x), case.y), tuner.loss(case.model(case.x), case.y)
    )
    assert again.step(case.batches).evidence == tuner.step(case.batches).evidence


@pytest.mark.parametrize(
    "given",
    [
        {"kfac_approx": {"*": "expand"}},
        {"subset_of_weights": ["0.*"]},
        {"fisher": "mc"},
        {"forward_fn": print},
    ],
)
def test_options_have_hashes(given):
    one, other = (CurvatureOptions.of("classification", **given) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert len({one, other, CurvatureOptions.of("classification")}) == 2


def test_a_guard_of_ones_own_is_no_part_of_a_posterior(monkeypatch):
    """One within a function cannot be pickled, and is not what the posterior is made of."""
    monkeypatch.setitem(registry.GUARDS, lambda x: x, lambda with_data, x: None)
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    assert torch.equal(pickled(la)(case.x), la(case.x))
