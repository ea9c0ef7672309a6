"""Test set-up: `tests/` is importable (oracles, cases, laws) and every random draw is seeded."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:  # pytest's importlib mode does not add it
    sys.path.insert(0, TESTS)

# Drawn inputs are the same ones each time; `--hypothesis-profile=fresh` draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("fresh", derandomize=False)
settings.load_profile("same")

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same global RNG state."""
    torch.manual_seed(0)


#: Cases of one test that the run without slow tests takes: a sample, the same one each time.
SAMPLE = 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is beyond the sample of a test's cases, in folders of rooms.

    Tests beside this file look at texts and names; each of their cases counts.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.parent != Path(TESTS) and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, cases in tests.items():
        if len(cases) > SAMPLE:
            kept = random.Random(name).sample(range(len(cases)), SAMPLE)
            for place in {*range(len(cases))}.difference(kept):
                cases[place].add_marker(pytest.mark.slow)
