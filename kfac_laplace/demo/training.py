"""The two training loops: plain, with a fixed weight decay, and tuned by the evidence."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from kfac_laplace import MarglikTuner
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.demo.data import Split, loader
from kfac_laplace.demo.settings import Recipe
from kfac_laplace.demo.timing import Stopwatch
from kfac_laplace.likelihoods import LikelihoodName

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """A trained network and what it cost.

    Attributes:
        model: the network.
        seconds: wall-clock time of all training runs that led to it.
        runs: how many those were.
        weight_decay: the fixed weight decay of plain training.
        tuner: the tuner of online training, with its history.
        rehearsal: the same network trained without the held-out images, for what they choose.
        curvature_seconds: the part of `seconds` that went into curvature.
    """

    model: nn.Module
    seconds: float
    runs: int = 1
    weight_decay: float | None = None
    tuner: MarglikTuner | None = None
    rehearsal: nn.Module | None = None
    curvature_seconds: float = 0.0


def train_plain(
    model: nn.Module, data: Split, loss: Loss, recipe: Recipe, *, seed: int, weight_decay: float
) -> Fit:
    """Maximum a posteriori under a fixed weight decay, as most networks are trained."""
    clock = Stopwatch(data.x)
    batches = loader(data, recipe.batch_size, shuffle_seed=seed)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=weight_decay
    )
    schedule = CosineAnnealingLR(optimizer, recipe.epochs)
    for _ in epochs(recipe, f"weight decay {weight_decay:g}"):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return Fit(model, clock(), weight_decay=weight_decay)


def train_online(
    model: nn.Module,
    data: Split,
    likelihood: LikelihoodName,
    recipe: Recipe,
    *,
    seed: int,
    kfac_approx: KfacApprox = "auto",
) -> Fit:
    """The same loop with the tuner's loss, and one more line each epoch: no grid, one run."""
    clock = Stopwatch(data.x)
    batches = loader(data, recipe.batch_size, shuffle_seed=seed)
    in_order = loader(data, batch_size=len(data.x))  # the curvature does not depend on the order
    tuner = MarglikTuner(
        model,
        likelihood,
        n_data=len(data.x),
        kfac_approx=kfac_approx,
        temperature=recipe.temperature,
        marglik_frequency=recipe.frequency,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    schedule = CosineAnnealingLR(optimizer, recipe.epochs)
    for _ in epochs(recipe, "online tuning"):
        for x, y in batches:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        schedule.step()
        tuner.step(in_order)
    curvature_seconds = sum(record.curvature_seconds for record in tuner.history)
    return Fit(model, clock(), tuner=tuner, curvature_seconds=curvature_seconds)


def epochs(recipe: Recipe, description: str) -> tqdm:
    """The epochs of one training run under a progress bar (none where stderr is no terminal)."""
    return tqdm(range(recipe.epochs), description, leave=False, disable=None)
