"""Test set-up: `tests/` is importable (oracles, cases, laws) and every random draw is seeded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TESTS = str(Path(__file__).parent)
if TESTS not in sys.path:  # pytest's importlib mode does not add it
    sys.path.insert(0, TESTS)

# The tests' tensors are small: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same global RNG state."""
    torch.manual_seed(0)
