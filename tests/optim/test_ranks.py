"""Several ranks train as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optim import rank

import kfac_laplace

SCRIPT = Path(rank.__file__)
#: Sums in another order, in float64, six steps, and inverses whose condition is about 1e3.
ROUNDING = 1e-9


def of_ranks(folder: Path, ranks: int, fisher: str) -> list[dict[str, torch.Tensor]]:
    """What each rank has in the end."""
    environment = os.environ | {"PYTHONPATH": str(Path(kfac_laplace.__file__).parents[1])}
    command = [sys.executable, str(SCRIPT), str(folder)]
    running = [
        subprocess.Popen([*command, str(k), str(ranks), fisher], env=environment)
        for k in range(ranks)
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * ranks
    return [torch.load(folder / f"{k}of{ranks}.pt") for k in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_ranks_make_the_steps_of_one_process(fisher, tmp_path):
    want = rank.train(0, 1, fisher)
    for got in of_ranks(tmp_path, 2, fisher):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.slow
def test_ranks_that_draw_other_labels_stay_together(tmp_path):
    """Bit by bit: their factors are the same sums."""
    first, second = of_ranks(tmp_path, 2, "mc")
    for name, value in first.items():
        assert torch.equal(second[name], value), name
