"""What does the tuner's loss cost a training step?

    python -m benchmarks.tuner_loss [--rounds N] [--output FILE]

Whole steps of Adam (forward, loss, backward, step) with `MarglikTuner.loss` against plain Adam with
weight decay, and against plain Adam without: seconds of the processor by medians over rounds in
which the contenders take turns. Beside them the bytes of the tensors that the loss and its backward
pass make for the prior, over those of the weights. The networks are the benchmarks' MLP and
ResNet-18 and one of 41 small layers, in which each call counts.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import Size, build, draw
from kfac_laplace import MarglikTuner
from kfac_laplace.states.files import write_text

Step = Callable[[], None]
DECAY = 5e-4
CASES = {"mlp": 32, "41 layers": 32, "resnet18": 8}


def small_layers(width: int = 32, depth: int = 41) -> nn.Module:
    """A chain of linear layers with ReLU, so small that calls take longer than arithmetic."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Network, inputs and labels."""
    if name != "41 layers":
        return build(name, 10, Size()), *draw(name, CASES[name], 10, Size())
    torch.manual_seed(1)
    return small_layers(), torch.randn(CASES[name], 32), torch.randint(32, (CASES[name],))


def plain(name: str, decay: float) -> Step:
    """A training step with torch's own loss."""
    model, x, y = case(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, weight_decay=decay)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def tuned(name: str) -> Step:
    """A training step with the tuner's loss, which holds the weight decay."""
    model, x, y = case(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    tuner = MarglikTuner(model, "classification", n_data=len(x))
    tuner.prepare([(x, y)])

    def step() -> None:
        optimizer.zero_grad()
        tuner.loss(model(x), y).backward()
        optimizer.step()

    return step


def seconds(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Processor time of a step, by medians over rounds in which the contenders take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        order = list(steps) if turn % 2 else list(steps)[::-1]
        for name in order:
            steps[name]()  # whose memory and caches are its own again
            start = time.process_time()
            for _ in range(5):
                steps[name]()
            found[name].append((time.process_time() - start) / 5)
    return {name: median(times) for name, times in found.items()}


class Made(TorchDispatchMode):
    """Counts the bytes of all tensors that are made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes += tensor.numel() * tensor.element_size()
        return found


def allocations(name: str) -> dict[str, float]:
    """Bytes of the tensors that the prior's part makes, over those of the weights."""
    model, x, y = case(name)
    tuner = MarglikTuner(model, "classification", n_data=len(x))
    tuner.prepare([(x, y)])
    output = model(x).detach()
    tuner.loss(output, y)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with Made() as forward:
        loss = tuner.loss(output, y)
    with Made() as backward:
        loss.backward()
    return {"forward": forward.bytes / weights, "backward": backward.bytes / weights}


def main() -> None:
    """Print a line for each network and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in CASES:
        steps = {"decay": plain(name, DECAY), "plain": plain(name, 0.0), "tuned": tuned(name)}
        found = seconds(steps, options.rounds if name != "resnet18" else options.rounds // 5)
        row = {
            "network": name,
            "seconds": found,
            "tuned ÷ decay": found["tuned"] / found["decay"],
            "tuned ÷ plain": found["tuned"] / found["plain"],
            "bytes made ÷ weights": allocations(name),
        }
        print(row, flush=True)
        rows.append(row)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


if __name__ == "__main__":
    main()
