"""Fifty SIGKILLs at random moments: each run ends at the same bits, and no file is damaged.

A fit is written after every batch and a training after every step, so that many are killed while
they write.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interruption.runs import RUNS

ROOT = Path(__file__).parents[2]
#: How many processes are killed of each run.
KILLS = {
    "fit": 6,
    "fit-ekfac": 6,
    "fit-lowrank": 4,
    "tuner": 6,
    "tuner-shared": 6,
    "kfac": 6,
    "kfac-damped": 4,
    "loop": 6,
    "experiment": 6,
}


def killed(name, kills, seed, folder):
    """What came of runs that were killed so often."""
    command = [sys.executable, "tests/interruption/forge.py", name, str(kills), str(seed), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_there_are_fifty_in_all():
    assert sum(KILLS.values()) == 50
    assert KILLS.keys() == RUNS.keys()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_killed_at_random_moments(name, tmp_path):
    found = killed(name, KILLS[name], 0, str(tmp_path))
    assert found["killed"] == KILLS[name]
    assert found["looked"] > 0
