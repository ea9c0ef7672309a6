"""One rank of a distributed run, or all data in one process; writes the parameters into a file.

Called as `python rank.py FOLDER RANK RANKS FISHER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_laplace.optim import KFAC, Damped, Estimate

STEPS, N = 6, 12


def network() -> nn.Module:
    """A convolution and two layers, one of which meets a single row of each example."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


def train(rank: int, ranks: int, fisher: str) -> dict[str, torch.Tensor]:
    """The parameters after a few steps on this rank's part of each batch."""
    inner = network()
    model = DistributedDataParallel(inner) if ranks > 1 else inner
    # The middle layer is wider than `largest`: of its A there is the diagonal.
    curvature = Estimate(fisher, every=2, bases_every=2, largest=10)
    optimizer = KFAC(model, rule=Damped(), curvature=curvature, seed=rank)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(N, 2, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 3, (N,), generator=generator)
        own = slice(rank * N // ranks, (rank + 1) * N // ranks)
        optimizer.zero_grad()
        F.cross_entropy(model(x[own]), y[own]).backward()
        optimizer.step()
    factors = {n: b.factors.output for n, b in optimizer.curvature(N).blocks.items()}
    return inner.state_dict() | {f"{name}.B": b for name, b in factors.items()}


def main(folder: Path, rank: int, ranks: int, fisher: str) -> None:
    """Train, and write."""
    torch.set_num_threads(1)
    if ranks > 1:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.save(train(rank, ranks, fisher), folder / f"{rank}of{ranks}.pt")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
