"""The methods of the UCI experiment: a function each, from a split to what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.clock import Clock
from benchmarks.experiments.data import Rows, uci
from benchmarks.experiments.networks import seeded
from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.demo.data import Split
from kfac_laplace.demo.metrics import coverage, gaussian_nll, rmse

WIDTH, LEARNING_RATE = 50, 1e-2
PLAIN = 1e-5
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
HELD_OUT = 0.2
#: Rounds of the tuner: an epoch is one step here.
FREQUENCY, HYPERSTEPS = 50, 50

Found = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """A trained network, and the seconds that it took."""

    model: nn.Module
    costs: dict[str, float]


@dataclass(frozen=True)
class Task:
    """What the methods share: a split, and initial weights by its number.

    Args:
        name: of the set.
        split: its number, which is the seed as well.
        epochs: steps on the whole training set.
        device: where.
        folder: of uci.npz.
    """

    name: str
    split: int
    epochs: int
    device: str
    folder: Path | None

    @cached_property
    def rows(self) -> Rows:
        """The split, on the device."""
        train, test, unit = uci(self.name, self.split, self.folder)
        on = [Split(part.x.to(self.device), part.y.to(self.device)) for part in (train, test)]
        return Rows(on[0], on[1], unit)

    def model(self) -> nn.Module:
        """A hidden layer of 50 GELUs."""
        inputs = self.rows.train.x.shape[1]

        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(inputs, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

        return seeded(make, self.split, self.device)

    def trained(
        self, data: Split, weight_decay: float = 0.0, tuner: MarglikTuner | None = None
    ) -> Fit:
        """Adam on a cosine, all rows at once; ½ (y − f)² where there is no tuner."""
        clock = Clock(self.device)
        model = tuner.model if tuner else self.model()
        optimizer = torch.optim.Adam(
            model.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay
        )
        schedule = CosineAnnealingLR(optimizer, self.epochs)
        for epoch in range(1, self.epochs + 1):
            optimizer.zero_grad()
            f = model(data.x)
            loss = tuner.loss(f, data.y) if tuner else 0.5 * F.mse_loss(f, data.y)
            loss.backward()
            optimizer.step()
            schedule.step()
            if tuner:
                tuner.step([data], epoch=epoch)
        return Fit(model.eval(), clock())

    @cached_property
    def plain(self) -> Fit:
        """Hardly any weight decay, all rows."""
        return self.trained(self.rows.train, PLAIN)


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """The network's mean (n, 1)."""
    return model(x)


def quality(task: Task, mean: Tensor, variance: Tensor) -> Found:
    """Negative log-likelihood and error on the original scale, coverage of 90 % intervals.

    Args:
        task: whose test rows are predicted.
        mean: (n, 1), standardised.
        variance: with the noise, (n, 1).
    """
    mean, variance, target = mean.double(), variance.double(), task.rows.test.y.double()
    return {
        "nll": gaussian_nll(mean, variance, target) + log(task.rows.unit),
        "rmse": rmse(mean, target) * task.rows.unit,
        "coverage": coverage(mean, variance, target),
    }


def of_mode(task: Task, model: nn.Module, sigma: float) -> Found:
    """The network's own mean with a noise."""
    mean = output(model, task.rows.test.x)
    return quality(task, mean, torch.full_like(mean, sigma**2)) | {"sigma": sigma}


def plain(task: Task) -> Found:
    """The noise is what training leaves."""
    train = task.rows.train
    sigma = rmse(output(task.plain.model, train.x), train.y)
    return of_mode(task, task.plain.model, sigma) | task.plain.costs


def grid(task: Task) -> Found:
    """Weight decay and noise by a fifth of the rows, then training on all of them."""
    clock, train = Clock(task.device), task.rows.train
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(task.split))
    shuffled = Split(train.x[order], train.y[order])
    held_out, kept = shuffled.cut(round(HELD_OUT * len(train.y)))
    errors = {
        decay: rmse(output(task.trained(kept, decay).model, held_out.x), held_out.y)
        for decay in GRID
    }
    best = min(errors, key=errors.__getitem__)
    fit = task.trained(train, best)
    costs = clock()
    return of_mode(task, fit.model, errors[best]) | costs | {"weight_decay": best}


def around(task: Task, la: Laplace) -> Found:
    """Predictions of a posterior with their noise, its evidence, and the mode with the same noise.

    What begins with "mode_" leaves the uncertainty of the weights out.
    """
    predictive, sigma = la.predict(task.rows.test.x), float(la.sigma_noise)
    found = quality(task, predictive.mean, predictive.covariance[:, 0] + sigma**2)
    mode = of_mode(task, la.model, sigma)
    found |= {f"mode_{name}": mode[name] for name in ("nll", "rmse", "coverage")}
    return found | {"sigma": sigma, "evidence": float(la.log_marginal_likelihood())}


def post_hoc(task: Task) -> Found:
    """A posterior around the plain network, prior and noise by the evidence."""
    la = Laplace(task.plain.model, "regression").fit([task.rows.train]).optimize_prior()
    return around(task, la) | task.plain.costs


def tuned(**options: Any) -> Callable[[Task], Found]:
    """Tuned while training, with the tuner's defaults but for the frequency of rounds."""

    def method(task: Task) -> Found:
        train = task.rows.train
        tuner = MarglikTuner(
            task.model(),
            "regression",
            len(train.y),
            marglik_frequency=FREQUENCY,
            n_hypersteps=HYPERSTEPS,
            **options,
        )
        fit = task.trained(train, tuner=tuner)
        costs = {"round_seconds": sum(record.seconds for record in tuner.history)}
        return around(task, tuner.laplace([train])) | costs | fit.costs

    return method


METHODS: dict[str, Callable[[Task], Found]] = {
    "plain": plain,
    "grid": grid,
    "post-hoc": post_hoc,
    "tuned": tuned(),
    "tuned-scalar": tuned(prior_structure="scalar"),
}
