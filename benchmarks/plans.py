"""What `Laplace.plan` says of five networks, beside what the fits then took.

    python -m benchmarks.plans [--cases mlp,resnet18] [--rounds 3] [--output FILE]

One thread. Each case has two processes of its own. In the first, plans and fits take turns, and
seconds are compared turn by turn; the median of the ratios counts, with the least and the largest.
In the second there is one fit, which is watched from outside: the most resident memory over what
the process held before (after a fit of two batches, so that libraries and their buffers are
there), and
the most bytes of tensors that torch's dispatcher saw, another fit later. A third process tells the
resident memory of an allocator that gives back at once what is freed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Size, build, draw
from benchmarks.resources import MIB, PeakMemory
from kfac_laplace import Laplace
from kfac_laplace.planning.counter import Count

Draw = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Planned:
    """A network, its data and its options.

    Args:
        network: makes it.
        draw: makes so many examples.
        likelihood: of the data.
        batch: examples of a batch.
        batches: number of them.
        options: of `Laplace`.
    """

    network: Callable[[], nn.Module]
    draw: Draw
    likelihood: str
    batch: int
    batches: int
    options: dict[str, Any] = field(default_factory=dict)


class Recurrent(nn.Module):
    """Tokens (n, t) to logits (n, classes) by an LSTM's last state."""

    def __init__(self, classes: int = 5, width: int = 192):
        super().__init__()
        self.table = nn.Embedding(500, 96)
        self.cells = nn.LSTM(96, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The last state's logits."""
        return self.head(self.cells(self.table(x))[0][:, -1])


def wide() -> nn.Module:
    """A regression net of 64 inputs, two layers of 1,536 units and three outputs."""
    width = 1536
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def _of_benchmarks(name: str, size: Size) -> tuple[Callable[[], nn.Module], Draw]:
    return lambda: build(name, 10, size), lambda n: draw(name, n, 10, size)


def _tokens(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(500, (n, 32)), torch.randint(5, (n,))


def _numbers(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 64), torch.randn(n, 3)


CASES = {
    "mlp": Planned(*_of_benchmarks("mlp", Size()), "classification", 512, 8),
    "resnet18": Planned(
        *_of_benchmarks("resnet18", Size()), "classification", 32, 4, {"fisher": "mc"}
    ),
    "vit": Planned(
        *_of_benchmarks("vit", Size(depth=3)),
        "classification",
        32,
        4,
        {"hessian_structure": "ekfac", "fisher": "mc"},
    ),
    "lstm": Planned(Recurrent, _tokens, "classification", 128, 4, {"hessian_structure": "diag"}),
    "wide": Planned(wide, _numbers, "regression", 256, 8),
}


def posterior(case: Planned) -> Laplace[Any]:
    """Unfitted, of a network with seeded weights."""
    torch.manual_seed(0)
    return Laplace(case.network(), case.likelihood, **case.options)


def loader(case: Planned) -> list[tuple[Tensor, Tensor]]:
    """All batches."""
    x, y = case.draw(case.batch * case.batches)
    return list(zip(x.split(case.batch), y.split(case.batch), strict=True))


def seconds(case: Planned, rounds: int) -> dict[str, Any]:
    """Plans and fits in turns."""
    batches, ratios, taken, planned = loader(case), [], [], []
    plan = posterior(case).plan(*batches[0], n_data=case.batch * case.batches)  # loads libraries
    for _ in range(rounds):
        start = perf_counter()
        plan = posterior(case).plan(*batches[0], n_data=case.batch * case.batches)
        middle = perf_counter()
        la = posterior(case).fit(batches)
        end = perf_counter()
        ratios.append(plan.seconds / (end - middle))
        taken.append(end - middle)
        planned.append(middle - start)
    held = [t for block in la.curvature.blocks.values() for t in block.tensors().values()]
    return {
        "seconds": median(taken),
        "planning_seconds": median(planned),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "vectors": plan.vectors,
        "operations": plan.operations,
        "planned_mib": plan.memory.peak / MIB,
        "planned_factors_mib": plan.memory.factors / MIB,
        "factors_mib": sum(t.numel() * t.element_size() for t in held) / MIB,
    }


def memory(case: Planned) -> dict[str, Any]:
    """The peak of a fit, as the kernel and as torch's dispatcher see it."""
    batches = loader(case)
    posterior(case).fit(batches[:2])  # loads libraries, whose own buffers stay
    la = posterior(case)
    peak = PeakMemory("cpu")
    la.fit(batches)
    resident = peak()
    la, count = posterior(case), Count()
    there = [t for batch in batches for t in batch]
    count.leave_out([*la.model.parameters(), *la.model.buffers(), *there])
    with count.watching():
        la.fit(batches)
    return {"resident_mib": resident, "tensors_mib": count.peak / MIB}


def main() -> None:
    """Measure each case in processes of its own; print a line and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=("seconds", "memory"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.cases.split(",")
    if options.part:
        case = CASES[names[0]]
        found = seconds(case, options.rounds) if options.part == "seconds" else memory(case)
        print(json.dumps(found))
        return
    rows = []
    for name in names:
        row: dict[str, Any] = {"case": name, **CASES[name].options}
        for part in ("seconds", "memory"):
            row |= _own_process(name, part, options.rounds)
        row["returned_mib"] = _own_process(name, "memory", 1, RETURNING)["resident_mib"]
        row["resident_ratio"] = row["planned_mib"] / row["resident_mib"]
        row["tensors_ratio"] = row["planned_mib"] / row["tensors_mib"]
        print(json.dumps(row), flush=True)
        rows.append(row)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


#: Has the allocator of the GNU C library give back all but small pieces at once.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _own_process(
    name: str, part: str, rounds: int, variables: dict[str, str] | None = None
) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plans", "--cases", name, "--part", part]
    done = subprocess.run(
        [*command, "--rounds", str(rounds)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | (variables or {}),
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
