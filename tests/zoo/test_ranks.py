"""Every network of the zoo, fitted by two and three processes, is what one process makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import NEGLIGIBLE, relative_error
from processes import on_ranks
from zoo import parted
from zoo.case import BUILDERS, build
from zoo.fitting import fitted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What so many ranks found, of all networks."""
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(request.param, folder, parted.on_rank, tuple(BUILDERS))


@pytest.mark.parametrize("name", BUILDERS)
def test_ranks_find_what_one_process_finds(name, ranks):
    case = build(name)
    want = parted.found(case, fitted(case))
    first, *others = (each[name] for each in ranks)
    for key, value in want.items():
        assert all(torch.equal(first[key], other[key]) for other in others), key
        error = relative_error(first[key], value, NEGLIGIBLE)
        assert error < case.tolerance, f"{key}: {error:.1e}"
