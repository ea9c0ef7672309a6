"""Fits of real architectures, interrupted and gone on with by another copy of the model."""

from __future__ import annotations

import pytest
from bits import assert_same_bits
from zoo.case import build
from zoo.fitting import zoo_law

from kfac_laplace import Checkpoint, Laplace
from kfac_laplace.curvature.live_state import live_to_plain


class Interrupted(Exception):
    pass


def two(batches):
    yield from batches[:2]
    raise Interrupted


def made(name):
    case = build(name)
    return Laplace(case.model, case.likelihood, **case.options), case.batches()


@pytest.mark.slow
@zoo_law
def test_an_interrupted_fit_ends_at_the_same_bits(name, tmp_path):
    """Layouts of rows, unread rows and checks that the first batches taught are in the file."""
    la, batches = made(name)
    wanted = live_to_plain(la.fit(batches).curvature.ggn)
    place = Checkpoint(tmp_path / "fit", every=1)
    first, batches = made(name)
    with pytest.raises(Interrupted):
        first.fit(two(batches), checkpoint=place)
    second, batches = made(name)
    found = live_to_plain(second.fit(batches, checkpoint=place).curvature.ggn)
    assert_same_bits(found, wanted)
