"""Sizes at which every task of the optimiser benchmark takes seconds."""

import pytest

from benchmarks.experiments.optimizers.methods import METHODS
from benchmarks.experiments.optimizers.task import Size

TINY = Size(steps=4, batch=5, every=2, train=12, held_out=8, width=8, depth=1, side=12)
#: What a task cannot do at that size.
SIDES = {"mnist-vit": 16, "graphs": 9}


def tiny(task):
    side = SIDES.get(task, TINY.side)
    depth = 2 if task == "convolutions" else TINY.depth
    width = 1 if task == "wrn" else TINY.width
    return Size(**(TINY.__dict__ | {"side": side, "depth": depth, "width": width}))


def can_run(method):
    reason = METHODS[method].lacks()
    return pytest.param(method, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
