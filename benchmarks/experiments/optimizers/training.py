"""A training run: its schedule, its curve, and the time of its steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.experiments.clock import Clock
from benchmarks.experiments.networks import seeded
from benchmarks.experiments.optimizers.methods import METHODS, Settings
from benchmarks.experiments.optimizers.task import Examples, Size, Task, batches, evaluated

#: A curve: values by name, each with one for every evaluation.
Curve = dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """What a training run depends on, but for task and method.

    Args:
        settings: of the method and the schedule.
        seed: of weights, batches and all draws.
        horizon: part of the full number of steps.
        tested: whether the curve is of test examples; else of those to validate on.
    """

    settings: Settings
    seed: int
    horizon: float
    tested: bool


def rate(step: int, steps: int, warmup: float, decay: str) -> float:
    """Factor of the learning rate: rises evenly to 1, then falls to 0 at the end.

    Args:
        step: number of steps already taken.
        steps: of the whole run.
        warmup: part of them in which it rises.
        decay: "cosine" or "linear".
    """
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    left = min(1.0, (step - rising) / max(1.0, steps - rising))
    return 1 - left if decay == "linear" else (1 + math.cos(math.pi * left)) / 2


def trained(task: Task, size: Size, method: str, run: Run, at: "At") -> dict[str, Any]:
    """Train, and evaluate every few steps.

    A run whose loss is not finite, or whose factors no longer decompose, ends there: it "diverged",
    and has no score.

    Returns:
        the "curve", "score" at the end (accuracy, or the negative of the NLL), "diverged",
        "settings", "device".
    """
    steps = max(1, round(run.horizon * size.steps))
    model = seeded(lambda: task.network(size), run.seed, at.device)
    model.train()
    settings: Mapping[str, Any] = run.settings
    curve: Curve = {name: [] for name in ("step", "seconds", "wall_seconds", "accuracy", "nll")}
    spent = {"seconds": 0.0, "wall_seconds": 0.0}
    ends = sorted({*range(size.every, steps, size.every), steps})
    taken, diverged = 0, False
    with torch.random.fork_rng():  # ASDL draws labels from the global generators
        torch.manual_seed(run.seed)
        stepper = METHODS[method].make(model, settings, run.seed)
        schedule = LambdaLR(
            stepper.optimizer,
            lambda step: rate(step, steps, settings["warmup"], settings["decay"]),
        )
        stream = batches(at.train, size.batch, run.seed)
        for end in ends:
            clock = Clock(at.device)
            try:
                for _ in range(end - taken):
                    stepper(*next(stream))
                    schedule.step()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in the stubs
                diverged = True
                break
            spent = {name: spent[name] + used for name, used in clock().items()}
            taken = end
            found = evaluated(model, at.test if run.tested else at.validation)
            if not math.isfinite(found["nll"]):
                diverged = True
                break
            for name, value in {"step": end, **spent, **found}.items():
                curve[name].append(value)
    return {
        "curve": curve,
        "score": None if diverged else scores(curve, task.measure)[-1],
        "diverged": diverged,
        "settings": dict(settings),
        "device": at.device,
    }


@dataclass(frozen=True)
class At:
    """A task's examples on a device."""

    device: str
    train: Examples
    validation: Examples
    test: Examples


def scores(curve: Mapping[str, list[float]], measure: str) -> list[float]:
    """What is to be large: the accuracy, or the negative of the NLL."""
    return [value if measure == "accuracy" else -value for value in curve[measure]]
