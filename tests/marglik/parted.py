"""Training on ranks with a tuner: importable, as new processes import it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_laplace import MarglikTuner, marglik_training
from kfac_laplace.errors import KfacLaplaceError
from kfac_laplace.optim import KFAC, Damped, Estimate

N, CLASSES, EPOCHS = 24, 3, 6


def network() -> nn.Module:
    """Two layers and a norm, in float64."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    """Inputs and labels that can be learned."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    return x, (x[:, :CLASSES] + 0.3 * x.flip(0)[:, :CLASSES]).argmax(1)


def own(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """A rank's equal part, in one batch."""
    x, y = data()
    part = slice(rank * N // ranks, (rank + 1) * N // ranks)
    return [(x[part], y[part])]


def tuned(kind: str, rank: int, ranks: int) -> dict[str, Any]:
    """Hyperparameters, weights and rounds after some epochs, on a rank's part of the data."""
    inner = network()
    model = DistributedDataParallel(inner) if ranks > 1 else inner
    loader = own(rank, ranks)
    options: dict[str, Any] = {"process_group": "world"} if ranks > 1 else {}
    if kind == "by averages":
        optimizer: Any = KFAC(
            model, lr=0.02, weight_decay=0.0, rule=Damped(), curvature=Estimate("exact", every=1)
        )
        options["curvature"] = optimizer
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options["n_epochs_burnin"] = 0 if kind == "waiting" else 2
    if kind == "mackay":
        options["method"] = "mackay"
    if kind == "patterns":
        options["prior_precision"] = {"0.*": 0.1, "*": 0.3}
    tuner = MarglikTuner(model, "classification", N, **options)
    if kind == "patterns":
        tuner.prepare(loader)
    for epoch in range(1, EPOCHS + 1):
        for x, y in loader:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        without = kind == "by averages" and epoch > 3
        tuner.step(None if without else loader)
    return {
        **tuner.hyperparameters(),
        **inner.state_dict(),
        "evidence": torch.tensor([record.evidence for record in tuner.history]),
        "losses": torch.tensor(tuner._progress.burn_in.epochs, dtype=torch.float64),
        "tuned": tuner.coverage,
    }


def trained(rank: int, ranks: int) -> dict[str, Any]:
    """What `marglik_training` gives."""
    inner = network()
    model = DistributedDataParallel(inner) if ranks > 1 else inner
    options: dict[str, Any] = {"process_group": "world"} if ranks > 1 else {}
    loader: Any = own(rank, ranks)
    if ranks > 1:
        dataset = TensorDataset(*data())
        sampler = DistributedSampler(dataset, shuffle=False)
        loader = DataLoader(dataset, N, sampler=sampler)
    la, _, margliks, losses = marglik_training(
        model,
        loader,
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        n_epochs=4,
        n_epochs_burnin=2,
        **options,
    )
    return {
        **inner.state_dict(),
        "precisions": la.prior_precision,
        "margliks": torch.tensor(margliks),
        "losses": torch.tensor(losses),
        "n_data": la.n_data,
    }


def refused(kind: str) -> str:
    """What is said where ranks cannot tune."""
    rank, inner = dist.get_rank(), network()
    model: nn.Module = inner if kind == "alone" else DistributedDataParallel(inner)
    try:
        if kind == "alone":
            marglik_training(model, own(rank, 2), n_epochs=1, process_group="world")
        elif kind == "objective":
            MarglikTuner(model, "classification", N, objective="exact", process_group="world")
        else:
            tuner = MarglikTuner(model, "classification", N, process_group="world")
            if kind == "rank 1 fails" and rank == 1:
                tuner.step([(torch.full((2, 4), torch.nan).double(), torch.zeros(2).long())])
            tuner.step(own(rank, 2))
    except KfacLaplaceError as error:
        return f"{type(error).__name__}: {error}"
    return ""


KINDS = ("plain", "waiting", "mackay", "patterns", "by averages")
REFUSALS = ("alone", "objective", "rank 1 fails")


def base() -> dict[str, Any]:
    """All that the tests look at."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {
        "tuned": {kind: tuned(kind, rank, ranks) for kind in KINDS},
        "trained": trained(rank, ranks),
        "refused": {kind: refused(kind) for kind in REFUSALS},
    }
