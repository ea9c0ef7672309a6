"""What ranks do in the tests of curvature over ranks: importable, as new processes import it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_laplace import Curvature, Kron, Laplace, MonteCarlo
from kfac_laplace.errors import KfacLaplaceError, UnsupportedUse
from kfac_laplace.likelihoods import Likelihood

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


def leading(ends: tuple[int, ...]) -> dict[str, Tensor]:
    """Blocks of which wide factors keep few directions, and what follows."""
    la = Laplace(network(), hessian_structure=Kron(3), process_group="world")
    return found(la.fit(part(ends, dist.get_rank())))


class Seen(MonteCarlo):
    """Labels that are drawn, and the seeds of the sources that they are drawn from."""

    seeds: ClassVar[list[int]] = []

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Those of Monte Carlo."""
        self.seeds.append(generator.initial_seed())
        return super().vectors(likelihood, f, y, generator)


def seeds(ends: tuple[int, ...]) -> set[int]:
    """Of what this rank draws from in two fits."""
    curvature = Curvature(network(), "classification", fisher=Seen(), process_group="world")
    for _ in range(2):
        curvature.fit(part(ends, dist.get_rank()))
    return {*Seen.seeds}


def unlike(ends: tuple[int, ...]) -> tuple[str, str]:
    """What is said where one rank's targets are no tensor, whatever those of the others."""
    rank, curvature = dist.get_rank(), Curvature(network(), "classification", process_group="world")
    x, y = (torch.cat(each) for each in zip(*whole(ends), strict=True))
    try:
        curvature.accumulate(x[rank:5], y[rank:5] if rank else y[:5].tolist())
    except KfacLaplaceError as error:
        return type(error).__name__, str(error)
    except Exception as error:
        return "not ours", repr(error)
    return "", ""


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


def base(ends: tuple[int, ...]) -> dict[str, Any]:
    """All that the quick tests look at, in processes that start once."""
    return {
        "fits": fits(ends, STRUCTURES),
        "leading": leading(ends),
        "batchwise": batchwise(ends),
        "drawn": {fisher: drawn(fisher, ends) for fisher in ("mc", "hybrid")},
        "sampled": {
            (shuffle, n, size): sampled(shuffle, n, size)
            for shuffle in (False, True)
            for n, size in ((N, 4), (7, 1), (2, 5))
        },
        "predicted": predicted(),
        "seeds": seeds(ends),
        "unlike": unlike(ends),
        "failing": {kind: failing(kind) for kind in FAILURES},
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
