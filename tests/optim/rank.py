"""Training with K-FAC on one rank of several, or on all data in one process: importable."""

from __future__ import annotations

import logging

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


def on_rank(fisher: str, by_hand: bool, given: str = "model") -> dict[str, torch.Tensor]:
    """The parameters after a few steps on this rank's part of each batch."""
    return train(dist.get_rank(), dist.get_world_size(), fisher, by_hand, given)


def told() -> list[str]:
    """Warnings of steps on one rank of which the others are not known."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kfac_laplace").addHandler(handler)
    optimizer = KFAC(model := network())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.ones(4, 2, 6).double()), torch.arange(4) % 3).backward()
        optimizer.step()
    return seen


def train(
    rank: int, ranks: int, fisher: str, by_hand: bool = False, given: str = "model"
) -> dict[str, torch.Tensor]:
    """Likewise, for any number of ranks.

    Args:
        rank: this one.
        ranks: how many there are.
        fisher: the estimator.
        by_hand: the loop averages the gradients itself.
        given: what the optimiser is given: the "model" as it is called, or what is "inside" it.
    """
    inner = network()
    model = DistributedDataParallel(inner) if ranks > 1 and not by_hand else inner
    # The middle layer is wider than `largest`: of its A there is the diagonal.
    curvature = Estimate(fisher, every=2, bases_every=2, largest=10)
    group = "world" if ranks > 1 and by_hand else None
    known = model if given == "model" else inner
    optimizer = KFAC(known, rule=Damped(), curvature=curvature, seed=rank, process_group=group)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(N, 2, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 3, (N,), generator=generator)
        own = slice(rank * N // ranks, (rank + 1) * N // ranks)
        optimizer.zero_grad()
        F.cross_entropy(model(x[own]), y[own]).backward()
        for parameter in inner.parameters() if group else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()
    factors = {n: b.factors.output for n, b in optimizer.curvature(N).blocks.items()}
    return inner.state_dict() | {f"{name}.B": b for name, b in factors.items()}
