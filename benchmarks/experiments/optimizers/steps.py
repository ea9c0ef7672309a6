"""What a step costs, beside one of AdamW, and how many numbers a method keeps."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.clock import Clock
from benchmarks.experiments.networks import seeded
from benchmarks.experiments.optimizers.methods import METHODS, Stepper
from benchmarks.experiments.optimizers.ranges import middle
from benchmarks.experiments.optimizers.task import Size, Task, batches
from benchmarks.experiments.optimizers.training import At

BASELINE = "adamw"
#: Steps after which captures and decompositions at default intervals begin anew.
CYCLE = 10
#: Steps before the first that counts: at the start of a run more of them capture and decompose.
BEFORE = 2 * CYCLE
#: Cycles that count, of each method in turn.
CYCLES = 10


def step_costs(task: Task, size: Size, method: str, at: At) -> dict[str, Any]:
    """Medians of the seconds of each step of a cycle, a method and AdamW in turn.

    Settings are the middles of all ranges, the learning rate stays as it is. Processor time on a
    CPU, the clock elsewhere.

    Returns:
        "cycle" and "baseline": medians by place in the cycle; "ratio" of their sums; "largest", the
        longest of the cycle over AdamW's step; "parameters"; "state", numbers kept for each, None
        where they cannot be counted.
    """
    kind = "seconds" if at.device == "cpu" else "wall_seconds"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        steppers, streams = [], []
        for name in (method, BASELINE):
            model = seeded(lambda: task.network(size), 0, at.device)
            model.train()
            steppers.append(METHODS[name].make(model, middle(METHODS[name].ranges), 0))
            streams.append(batches(at.train, size.batch, 0))
        times: list[list[list[float]]] = [[[] for _ in range(CYCLE)] for _ in steppers]
        for cycle in range(BEFORE // CYCLE + min(CYCLES, size.steps)):
            for stepper, stream, places in zip(steppers, streams, times, strict=True):
                for place in places:
                    x, y = next(stream)
                    clock = Clock(at.device)
                    stepper(x, y)
                    if cycle >= BEFORE // CYCLE:
                        place.append(clock()[kind])
    own, baseline = ([statistics.median(place) for place in places] for places in times)
    plain, parameters = statistics.fmean(baseline), _parameters(steppers[0])
    return {
        "cycle": own,
        "baseline": baseline,
        "ratio": statistics.fmean(own) / plain,
        "largest": max(own) / plain,
        "parameters": parameters,
        "state": None if METHODS[method].elsewhere else numbers_kept(steppers[0]) / parameters,
        "device": at.device,
    }


def _parameters(stepper: Stepper) -> int:
    groups = stepper.optimizer.param_groups
    return sum(p.numel() for group in groups for p in group["params"])


def numbers_kept(stepper: Stepper) -> int:
    """Floating-point numbers in an optimiser's state, and what it keeps beside that."""
    optimizer = stepper.optimizer
    beside = optimizer.kept() if hasattr(optimizer, "kept") else None
    return _count([optimizer.state_dict(), beside])


def _count(found: Any) -> int:
    """Numbers in all floating-point tensors of nested containers."""
    if isinstance(found, Tensor):
        return found.numel() if found.is_floating_point() and found.ndim else 0
    if isinstance(found, Mapping):
        return sum(_count(value) for value in found.values())
    if isinstance(found, Sequence) and not isinstance(found, str | bytes):
        return sum(_count(value) for value in found)
    return 0
