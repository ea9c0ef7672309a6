"""What the classification half compares: a table of ways to train and ways to predict."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.demo import metrics
from kfac_laplace.demo.data import Batches, Images, Split, loader
from kfac_laplace.demo.models import IMAGE_MODELS, seeded
from kfac_laplace.demo.settings import Recipe, Settings
from kfac_laplace.demo.timing import Stopwatch
from kfac_laplace.demo.training import Fit, train_online, train_plain


@dataclass(frozen=True)
class Problem:
    """What all methods share under one seed: network, data, initial weights, order of batches."""

    name: str
    data: Images
    settings: Settings
    seed: int

    @property
    def recipe(self) -> Recipe:
        """How this network is trained."""
        return self.settings.images[self.name]

    @property
    def held_out(self) -> Split:
        """Training images on which something is chosen, the same for all methods."""
        return self._cut[0]

    @property
    def kept(self) -> Split:
        """The training images without those."""
        return self._cut[1]

    @property
    def _cut(self) -> tuple[Split, Split]:
        return self.data.train.cut(round(self.settings.holdout * len(self.data.train.x)))

    def network(self) -> nn.Module:
        """A fresh network with this seed's initial weights."""
        return seeded(IMAGE_MODELS[self.name], self.seed, self.settings.device)


class Prediction(NamedTuple):
    """Class probabilities (n, c) and how strange the inputs look (n,), where a posterior says."""

    probs: Tensor
    ood_score: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """A way to predict, and what it cost beyond training.

    Attributes:
        predict: inputs (n, 1, 8, 8) to a prediction.
        log_evidence: log marginal likelihood of the training data, in nats.
        seconds: wall-clock time of the posterior; training and predicting not included.
        curvature_seconds: the part of `seconds` that went into curvature.
        posterior_scale: κ of the posterior; None without one.
        temperature: what logits are divided by; None where predictions know of none.
    """

    predict: Callable[[Tensor], Prediction]
    log_evidence: float
    seconds: float = 0.0
    curvature_seconds: float = 0.0
    posterior_scale: float | None = None
    temperature: float | None = None


# ---------------------------------------------------------------- ways to train


def default_map(problem: Problem) -> Fit:
    """Plain training with the default weight decay."""
    return plain(problem, problem.data.train, problem.recipe.weight_decay)


def fixed_map(problem: Problem) -> Fit:
    """Plain training under a sensible fixed precision: δ = λ N."""
    data = problem.data.train
    return plain(problem, data, problem.settings.fixed_precision / len(data.x))


def grid_map(problem: Problem) -> Fit:
    """Weight decay chosen by a grid on held-out training images, then trained again on all.

    The held-out images come out of the same 200 that every other method trains on, so no method
    sees more labels; the last training run, on all of them, is counted as well.
    """
    clock = Stopwatch(problem.data.train.x)
    held_out, scores = problem.held_out, {}
    for weight_decay in problem.settings.grid:
        model = plain(problem, problem.kept, weight_decay).model
        scores[weight_decay] = metrics.nll(mode(model)(held_out.x).probs, held_out.y)
    fit = plain(problem, problem.data.train, min(scores, key=scores.__getitem__))
    return replace(fit, seconds=clock(), runs=len(scores) + 1)


def rehearsed_map(problem: Problem) -> Fit:
    """The default weight decay, without the held-out images, which then choose, and on all."""
    rehearsal = plain(problem, problem.kept, problem.recipe.weight_decay)
    fit = default_map(problem)
    return replace(fit, seconds=rehearsal.seconds + fit.seconds, runs=2, rehearsal=rehearsal.model)


def online_expand(problem: Problem) -> Fit:
    """Tuned while training, with K-FAC-expand."""
    return online(problem, "expand")


def online_default(problem: Problem) -> Fit:
    """Tuned while training by defaults: K-FAC-reduce in all layers but keys."""
    return online(problem, "auto")


def plain(problem: Problem, data: Split, weight_decay: float) -> Fit:
    """One plain training run."""
    return train_plain(
        problem.network(),
        data,
        F.cross_entropy,
        problem.recipe,
        seed=problem.seed,
        weight_decay=weight_decay,
    )


def online(problem: Problem, kfac_approx: KfacApprox) -> Fit:
    """One tuned training run."""
    return train_online(
        problem.network(),
        problem.data.train,
        "classification",
        problem.recipe,
        seed=problem.seed,
        kfac_approx=kfac_approx,
    )


# ---------------------------------------------------------------- ways to predict


def mode(model: nn.Module, temperature: float = 1.0) -> Callable[[Tensor], Prediction]:
    """Softmax of the network's output over a temperature: a point estimate."""

    @torch.no_grad()
    def predict(x: Tensor) -> Prediction:
        return Prediction((model(x) / temperature).softmax(-1))

    return predict


def plain_mode(fit: Fit, problem: Problem) -> Answer:
    """The mode. Its evidence, by K-FAC, takes the weight decay for the prior that it is."""
    assert fit.weight_decay is not None
    precision = fit.weight_decay * len(problem.data.train.x)
    la = Laplace(fit.model, "classification", prior_precision=precision).fit(in_order(problem))
    return Answer(mode(fit.model), float(la.log_marginal_likelihood()))


def temperature_scaled(fit: Fit, problem: Problem) -> Answer:
    """The mode at the temperature of least NLL on held-out images [Guo et al. 2017].

    The images choose for a network that has not seen them; the one trained on all takes it over.
    """
    assert fit.rehearsal is not None
    clock = Stopwatch(problem.data.train.x)
    held_out = problem.held_out

    def loss(temperature: float) -> float:
        probs = mode(fit.rehearsal, temperature)(held_out.x).probs  # type: ignore[arg-type]
        return metrics.nll(probs, held_out.y)

    best = min(torch.logspace(-1, 1, 201).tolist(), key=loss)
    seconds = clock()
    answer = plain_mode(fit, problem)
    return replace(answer, predict=mode(fit.model, best), seconds=seconds, temperature=best)


def tuned(fit: Fit, problem: Problem) -> Answer:
    """The posterior around a tuned network, at what the tuner chose."""
    assert fit.tuner is not None
    clock = Stopwatch(problem.data.train.x)
    la = fit.tuner.laplace(in_order(problem))
    seconds = clock()
    return posterior(la, seconds, seconds)


def post_hoc(fit: Fit, problem: Problem) -> Answer:
    """A posterior around a finished network, its prior tuned afterwards."""
    la, seconds, curvature_seconds = around(fit, problem)
    return posterior(la, seconds, curvature_seconds)


def post_hoc_probit(fit: Fit, problem: Problem) -> Answer:
    """The same posterior, averaged at its own scale by the probit link."""
    la, seconds, curvature_seconds = around(fit, problem)
    return posterior(la, seconds, curvature_seconds, link="probit")


def post_hoc_left_out(fit: Fit, problem: Problem) -> Answer:
    """The same posterior, its covariance scaled by leave-one-out on the training images."""
    la, seconds, curvature_seconds = around(fit, problem)
    clock = Stopwatch(problem.data.train.x)
    la.calibrate()
    return posterior(la, seconds + clock(), curvature_seconds)


def post_hoc_held_out(fit: Fit, problem: Problem) -> Answer:
    """Scale and temperature by the images of temperature scaling, and taken over likewise."""
    assert fit.rehearsal is not None
    clock = Stopwatch(problem.data.train.x)
    kept, held_out = (loader(part, len(part.x)) for part in (problem.kept, problem.held_out))
    chosen = Laplace(fit.rehearsal, "classification").fit(kept, val_loader=held_out)
    chosen.optimize_prior()
    rehearsed = clock()
    la, seconds, curvature_seconds = around(fit, problem)
    la.posterior_scale = chosen.posterior_scale
    la.predictive_temperature = chosen.predictive_temperature
    return posterior(la, rehearsed + seconds, curvature_seconds)


def around(fit: Fit, problem: Problem) -> tuple[Laplace, float, float]:
    """The post-hoc posterior, the seconds that it took, and those of them for curvature."""
    clock = Stopwatch(problem.data.train.x)
    la = Laplace(fit.model, "classification").fit(in_order(problem))
    curvature_seconds = clock()
    la.optimize_prior()
    return la, clock(), curvature_seconds


def posterior(la: Laplace, seconds: float, curvature_seconds: float, link: str = "auto") -> Answer:
    """The predictive by a link, and the posterior's score of strange inputs."""

    def predict(x: Tensor) -> Prediction:
        predictive = la.predict(x, link_approx=link)
        return Prediction(predictive.probs, predictive.ood_score)

    return Answer(
        predict,
        float(la.log_marginal_likelihood()),
        seconds,
        curvature_seconds,
        float(la.posterior_scale),
        float(la.predictive_temperature),
    )


def in_order(problem: Problem) -> Batches:
    """The training images in one batch."""
    return loader(problem.data.train, batch_size=len(problem.data.train.x))


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """A row of the table. Rows that train alike share one training run."""

    name: str
    train: Callable[[Problem], Fit]
    answer: Callable[[Fit, Problem], Answer]


METHODS = (
    Method("MAP, default weight decay", default_map, plain_mode),
    Method("MAP, δ = 1", fixed_map, plain_mode),
    Method("MAP, weight decay by grid", grid_map, plain_mode),
    Method("MAP + temperature scaling", rehearsed_map, temperature_scaled),
    Method("post-hoc", default_map, post_hoc),
    Method("post-hoc, probit at κ = 1", default_map, post_hoc_probit),
    Method("post-hoc, leave-one-out", default_map, post_hoc_left_out),
    Method("post-hoc, held-out data", rehearsed_map, post_hoc_held_out),
    Method("online, expand", online_expand, tuned),
    Method("online", online_default, tuned),
)
