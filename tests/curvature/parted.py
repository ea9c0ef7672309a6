"""What ranks do in the tests of curvature over ranks: importable, as new processes import it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_laplace import Checkpoint, Curvature, Laplace
from kfac_laplace.errors import KfacLaplaceError, OtherRankFailed, UnsupportedUse

STRUCTURES = ("kron", "ekfac", "diag", "full", "lowrank")
N, CLASSES = 23, 3


def network() -> nn.Module:
    """A convolution, norms and two layers, one of which meets a single row of each example."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 4, 3), nn.LayerNorm(4), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def data() -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 2, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, CLASSES, (N,), generator=generator)


def part(ends: tuple[int, ...], rank: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A rank's batches: its examples end where `ends` says."""
    x, y = data()
    start = ends[rank - 1] if rank else 0
    own = slice(start, ends[rank])
    return (
        [*zip(x[own].split(size), y[own].split(size), strict=True)] if own.start < own.stop else []
    )


def whole(ends: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The batches of all ranks."""
    return [batch for rank in range(len(ends)) for batch in part(ends, rank)]


def found(la: Laplace) -> dict[str, Tensor]:
    """What a fit and its consequences are, by name."""
    x, _ = data()
    la.optimize_prior(n_steps=20)
    la.prior_precision = la.prior_precision.clamp(0.01, 10.0)  # predictions that say something
    blocks = {f"block {name}": block.dense() for name, block in la.curvature.blocks.items()}
    return blocks | {
        "statistic": la.curvature.statistic,
        "counts": torch.tensor([la.n_data, la.curvature.n_rows, la.curvature.n_outputs]),
        "precisions": la.prior_precision,
        "evidence": la.log_marginal_likelihood().detach(),
        "predictions": la(x),
        "samples": la.predictive_samples(x, n_samples=3),
    }


def fits(ends: tuple[int, ...], structures: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """On each rank: a fit of all, and more data added to it."""
    rank, answers = dist.get_rank(), {}
    for structure in structures:
        la = Laplace(network(), hessian_structure=structure, process_group="world")
        answers[structure] = found(la.fit(part(ends, rank)))
        more = [(x.cos(), y) for x, y in part(ends, rank)]
        answers[f"{structure}, more"] = found(la.fit(more, override=False))
    return answers


def alone(ends: tuple[int, ...], structures: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """The same in one process."""
    answers = {}
    for structure in structures:
        la = Laplace(network(), hessian_structure=structure)
        answers[structure] = found(la.fit(whole(ends)))
        more = [(x.cos(), y) for x, y in whole(ends)]
        answers[f"{structure}, more"] = found(la.fit(more, override=False))
    return answers


def batchwise(ends: tuple[int, ...]) -> list[Tensor]:
    """Blocks after `accumulate` of two batches, of which some ranks have no part."""
    curvature = Curvature(network(), "classification", process_group="world")
    x, y = data()
    rank = dist.get_rank()
    own = slice(ends[rank - 1] if rank else 0, ends[rank])
    for step in (0.0, 1.0):
        curvature.accumulate(x[own] + step, y[own])
    return [block.dense() for block in curvature.blocks.values()]


def drawn(fisher: str, ends: tuple[int, ...]) -> dict[str, Tensor]:
    """Blocks by an estimator that draws, and the state of its source afterwards."""
    curvature = Curvature(network(), "classification", fisher=fisher, process_group="world")
    curvature.fit(part(ends, dist.get_rank())).fit(part(ends, dist.get_rank()))
    blocks = {name: block.dense() for name, block in curvature.blocks.items()}
    return blocks | {"draws": curvature.generator.get_state()}


def sampled(shuffle: bool, n: int, size: int) -> dict[str, Any]:
    """A fit of loaders with a DistributedSampler, and which examples came."""
    x, y = data()
    seen: list[int] = []

    def collate(batch: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        seen.extend(int(index) for _, _, index in batch)
        return torch.stack([x for x, _, _ in batch]), torch.stack([y for _, y, _ in batch])

    dataset = TensorDataset(x[:n], y[:n], torch.arange(n))
    sampler = DistributedSampler(dataset, shuffle=shuffle)
    loader = DataLoader(dataset, size, sampler=sampler, collate_fn=collate)
    curvature = Curvature(
        network(), "classification", hessian_structure="full", process_group="world"
    )
    curvature.fit(loader)
    return {"seen": seen, "n_data": curvature.n_data, "full": curvature.blocks["full"].dense()}


def predicted() -> dict[str, Tensor]:
    """Predictions over loaders of parts, and what held-out parts choose."""
    x, y = data()
    rank, dataset = dist.get_rank(), TensorDataset(x.cos(), y)
    la = Laplace(network(), prior_precision=0.1, process_group="world")
    la.fit(part((9, N, N), rank))
    found = {}
    for shuffle in (False, True):
        sampler = DistributedSampler(dataset, shuffle=shuffle, seed=3)
        loader = DataLoader(dataset, 4, sampler=sampler)
        for kind in ("glm", "linear", "nn"):
            found[f"{kind} {shuffle}"] = la.predict_loader(loader, kind, n_samples=5).mean
    la.calibrate(loader)
    found["scaling"] = torch.stack([la.posterior_scale, la.predictive_temperature])
    la.optimize_prior("gridsearch", val_loader=loader)
    for ask in (
        lambda: la.report(loader),
        lambda: la.calibrate(loader, "loo"),
        lambda: la.evidence(loader=loader),
        lambda: la.optimize_prior(objective="exact", loader=loader),
    ):
        try:
            ask()
        except UnsupportedUse as error:
            assert "all of the data" in str(error)
        else:
            raise AssertionError("a part was taken for all data")
    return found | {"grid": la.prior_precision}


def predicted_alone() -> dict[str, Tensor]:
    """The same in one process."""
    x, y = data()
    la = Laplace(network(), prior_precision=0.1).fit(whole((9, N, N)))
    found = {}
    for kind in ("glm", "linear", "nn"):
        mean = la.predict(x.cos(), kind, n_samples=5).mean
        found |= {f"{kind} {shuffle}": mean for shuffle in (False, True)}
    loader = [(x.cos(), y)]
    la.calibrate(loader)
    found["scaling"] = torch.stack([la.posterior_scale, la.predictive_temperature])
    la.optimize_prior("gridsearch", val_loader=loader)
    return found | {"grid": la.prior_precision}


def failing(kind: str) -> tuple[str, str, int, bool]:
    """What a fit raises that cannot succeed, and whether it left the curvature as it was."""
    rank, model = dist.get_rank(), network()
    ends = (9, N, N)
    batches, options = part(ends, rank), {}
    before = Curvature(model, "classification", process_group="world").fit(batches)
    state, draws = before.ggn, before.generator.get_state()
    if kind == "nan on rank 1" and rank == 1:
        batches = [*batches, (torch.full((2, 2, 6), torch.nan).double(), torch.tensor([0, 1]))]
    elif kind == "bad loader on rank 0" and rank == 0:
        batches = [batches[0], 3]  # type: ignore[list-item]
    elif kind == "no loader on rank 2" and rank == 2:
        batches = 3  # type: ignore[assignment]
    elif kind == "the same data":
        batches = whole(ends)
    elif kind == "no data":
        batches = []
    elif kind == "other weights" and rank == 1:
        with torch.no_grad():
            model[0].weight[0, 0, 0] += 1e-12
    elif kind == "other options" and rank == 2:
        options = {"hessian_structure": "diag"}
    curvature = (
        before
        if not options
        else Curvature(model, "classification", process_group="world", **options)
    )
    try:
        curvature.fit(batches)
    except KfacLaplaceError as error:
        kept = curvature is not before or (
            curvature.ggn is state and torch.equal(curvature.generator.get_state(), draws)
        )
        return type(error).__name__, str(error), curvature.n_data, kept
    return "", "", curvature.n_data, False


def resumed(ends: tuple[int, ...], structure: str) -> list[tuple[str, bool, list[str]]]:
    """Fits that a rank's error interrupts before one of its batches, and that go on.

    Returns:
        For each the error on this rank, whether the end has the bits of a fit without interruption,
        and what is left in the folder.
    """
    options: dict[str, Any] = {"hessian_structure": structure, "process_group": "world"}
    own = part(ends, dist.get_rank())

    def curvature() -> Curvature:
        return Curvature(network(), "classification", fisher="mc", **options)

    want, found = curvature().fit(own).state_dict(), []
    for failing, at in INTERRUPTED[structure]:
        names = [tempfile.mkdtemp()]
        dist.broadcast_object_list(names)
        kept, said = Checkpoint(Path(names[0]) / "fit", every=1), ""
        loader: Any = Dying(own, at) if dist.get_rank() == failing else own
        try:
            curvature().fit(loader, checkpoint=kept)
        except (OSError, OtherRankFailed) as error:
            said = f"{type(error).__name__}: {error}"
        dist.barrier()
        again = curvature().fit(own, checkpoint=kept)
        dist.barrier()
        equal = again.state_dict()["checksum"] == want["checksum"]
        found.append((said, equal, sorted(os.listdir(names[0]))))
    return found


class Dying:
    """Batches of which some can be read, over all passes, and then none.

    Args:
        batches: all.
        left: how many can be read.
    """

    def __init__(self, batches: list[Any], left: int):
        self.batches, self.left = batches, left

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
            yield batch


def all_resumed(ends: tuple[int, ...]) -> dict[str, list[tuple[str, bool, list[str]]]]:
    """Those of each structure."""
    return {structure: resumed(ends, structure) for structure in INTERRUPTED}


def killed(ends: tuple[int, ...]) -> tuple[str, int]:
    """What a fit raises while rank 1 is killed, and how many examples it left."""
    rank = dist.get_rank()

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for k, batch in enumerate(part(ends, rank)):
            if rank == 1 and k == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    curvature = Curvature(network(), "classification", process_group="world")
    try:
        curvature.fit(loader())
    except RuntimeError as error:
        return str(error), curvature.n_data
    return "", curvature.n_data


def base(ends: tuple[int, ...]) -> dict[str, Any]:
    """All that the quick tests look at, in processes that start once."""
    return {
        "fits": fits(ends, STRUCTURES),
        "batchwise": batchwise(ends),
        "drawn": {fisher: drawn(fisher, ends) for fisher in ("mc", "hybrid")},
        "sampled": {
            (shuffle, n, size): sampled(shuffle, n, size)
            for shuffle in (False, True)
            for n, size in ((N, 4), (7, 1), (2, 5))
        },
        "predicted": predicted(),
        "failing": {kind: failing(kind) for kind in FAILURES},
    }


#: Which rank fails, and after how many batches: the first has 3, the second 4, and "ekfac" reads
#: them twice.
INTERRUPTED = {
    "kron": ((0, 0), (0, 1), (1, 2), (1, 3)),
    "ekfac": ((1, 1), (0, 3), (1, 5), (0, 5)),
    "lowrank": ((0, 2), (1, 1)),
}
FAILURES = (
    "nan on rank 1",
    "bad loader on rank 0",
    "no loader on rank 2",
    "the same data",
    "no data",
    "other weights",
    "other options",
)
