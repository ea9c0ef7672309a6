"""What the classification half compares: a table of ways to train and ways to predict."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.curvature.estimate.blocks import Structure
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.demo import metrics
from kfac_laplace.demo.data import Batches, Images, Split, loader
from kfac_laplace.demo.models import IMAGE_MODELS, REDUCE, seeded
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

    def kfac_approx(self, setting: Literal["expand", "reduce"]) -> KfacApprox:
        """The setting for each layer: "reduce" leaves out what it is blind to."""
        return REDUCE[self.name] if setting == "reduce" else setting

    def network(self) -> nn.Module:
        """A fresh network with this seed's initial weights."""
        return seeded(IMAGE_MODELS[self.name], self.seed, self.settings.device)


@dataclass(frozen=True)
class Answer:
    """A way to predict, and what it cost beyond training.

    Attributes:
        predict: inputs (n, 1, 8, 8) to class probabilities (n, c).
        log_evidence: log marginal likelihood of the training data, in nats.
        seconds: wall-clock time of the posterior; training and predicting not included.
        curvature_seconds: the part of `seconds` that went into curvature.
        posterior_scale: factor on the predictive covariance; None for a point estimate.
    """

    predict: Callable[[Tensor], Tensor]
    log_evidence: float
    seconds: float = 0.0
    curvature_seconds: float = 0.0
    posterior_scale: float | None = None


# ---------------------------------------------------------------- ways to train


def default_map(problem: Problem) -> Fit:
    """Plain training with the default weight decay."""
    return plain(problem, problem.data.train, problem.recipe.weight_decay)


def grid_map(problem: Problem) -> Fit:
    """Weight decay chosen by a grid on held-out training images, then trained again on all.

    The validation images come out of the same 200 that every other method trains on, so no
    method sees more labels; the last training run, on all of them, is counted as well.
    """
    clock = Stopwatch(problem.data.train.x)
    n_held_out = round(problem.settings.holdout * len(problem.data.train.x))
    held_out, kept = problem.data.train.cut(n_held_out)
    scores = {}
    for weight_decay in problem.settings.grid:
        model = plain(problem, kept, weight_decay).model
        scores[weight_decay] = metrics.nll(mode(model)(held_out.x), held_out.y)
    fit = plain(problem, problem.data.train, min(scores, key=scores.__getitem__))
    return replace(fit, seconds=clock(), runs=len(scores) + 1)


def online_expand(problem: Problem) -> Fit:
    """Tuned while training, with K-FAC-expand."""
    return online(problem, "expand")


def online_reduce(problem: Problem) -> Fit:
    """Tuned while training, with K-FAC-reduce."""
    return online(problem, "reduce")


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


def online(problem: Problem, kfac_approx: Literal["expand", "reduce"]) -> Fit:
    """One tuned training run."""
    return train_online(
        problem.network(),
        problem.data.train,
        "classification",
        problem.recipe,
        seed=problem.seed,
        kfac_approx=problem.kfac_approx(kfac_approx),
    )


# ---------------------------------------------------------------- ways to predict


def mode(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Softmax of the network's output: a point estimate."""

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return model(x).softmax(-1)

    return predict


def plain_mode(fit: Fit, problem: Problem) -> Answer:
    """The mode. Its evidence, by K-FAC-reduce, takes the weight decay for the prior that it is."""
    assert fit.weight_decay is not None
    la = Laplace(
        fit.model,
        "classification",
        prior_precision=fit.weight_decay * len(problem.data.train.x),
        kfac_approx=problem.kfac_approx("reduce"),
    ).fit(in_order(problem))
    return Answer(mode(fit.model), float(la.log_marginal_likelihood()))


def tuned_mode(fit: Fit, problem: Problem) -> Answer:
    """The mode of a tuned network, with the evidence of the posterior around it."""
    assert fit.tuner is not None
    clock = Stopwatch(problem.data.train.x)
    la = fit.tuner.laplace(in_order(problem))
    seconds = clock()
    return Answer(mode(fit.model), float(la.log_marginal_likelihood()), seconds, seconds)


def calibrated(fit: Fit, problem: Problem) -> Answer:
    """The linearised predictive, its covariance scaled by leave-one-out on the training images."""
    assert fit.tuner is not None
    clock = Stopwatch(problem.data.train.x)
    la = fit.tuner.laplace(in_order(problem))
    curvature_seconds = clock()
    la.calibrate()
    return linearised(la, clock(), curvature_seconds)


def post_hoc(
    structure: Structure, kfac_approx: Literal["expand", "reduce"]
) -> Callable[[Fit, Problem], Answer]:
    """A Laplace posterior around a finished network, its prior tuned afterwards."""

    def answer(fit: Fit, problem: Problem) -> Answer:
        clock = Stopwatch(problem.data.train.x)
        la = Laplace(
            fit.model,
            "classification",
            hessian_structure=structure,
            kfac_approx=problem.kfac_approx(kfac_approx),
        ).fit(in_order(problem))
        curvature_seconds = clock()
        la.optimize_prior()
        return linearised(la, clock(), curvature_seconds)

    return answer


def post_hoc_calibrated(fit: Fit, problem: Problem) -> Answer:
    """Post-hoc K-FAC-reduce, its covariance scaled by leave-one-out on the training images."""
    clock = Stopwatch(problem.data.train.x)
    la = Laplace(fit.model, "classification", kfac_approx=problem.kfac_approx("reduce"))
    la.fit(in_order(problem))
    curvature_seconds = clock()
    la.optimize_prior().calibrate()
    return linearised(la, clock(), curvature_seconds)


def linearised(la: Laplace, seconds: float, curvature_seconds: float) -> Answer:
    """The posterior's predictive at its own scale: linearised network, probit link."""

    def predict(x: Tensor) -> Tensor:
        return la.predict(x, link_approx="probit").probs

    return Answer(
        predict,
        float(la.log_marginal_likelihood()),
        seconds,
        curvature_seconds,
        float(la.posterior_scale),
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
    Method("MAP, weight decay by grid", grid_map, plain_mode),
    Method("post-hoc Laplace, diag", default_map, post_hoc("diag", "expand")),
    Method("post-hoc Laplace, kron-expand", default_map, post_hoc("kron", "expand")),
    Method("post-hoc Laplace, kron-reduce", default_map, post_hoc("kron", "reduce")),
    Method("post-hoc, kron-reduce + calibrated", default_map, post_hoc_calibrated),
    Method("online, expand", online_expand, tuned_mode),
    Method("online, reduce", online_reduce, tuned_mode),
    Method("online, reduce + calibrated", online_reduce, calibrated),
)
