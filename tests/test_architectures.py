"""The tables of docs/architectures.md are what fits give.

`PYTHONPATH=tests python -m architectures` writes them anew.
"""

from __future__ import annotations

import pytest
from architectures.kinds import KINDS
from architectures.table import as_lines, committed, layer_rows, network_rows
from zoo.fitting import BUILDERS, zoo_law


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_of_a_layer(kind):
    """Also: dense and diagonal blocks are exact, or there is no row to compare."""
    assert committed("layers")[kind.name] == as_lines(layer_rows(kind))


@zoo_law
def test_row_of_a_network(name):
    assert committed("networks")[name] == as_lines(network_rows(name))


def test_nothing_else_is_listed():
    assert [*committed("layers")] == [kind.name for kind in KINDS]
    assert [*committed("networks")] == [*BUILDERS]
