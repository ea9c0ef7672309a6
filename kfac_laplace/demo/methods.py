"""What the classification half compares: a table of ways to train and ways to predict."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F

from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.demo import metrics
from kfac_laplace.demo.answers import (
    Answer,
    mode,
    plain_mode,
    post_hoc,
    post_hoc_held_out,
    post_hoc_left_out,
    post_hoc_probit,
    temperature_scaled,
    tuned,
)
from kfac_laplace.demo.data import Split
from kfac_laplace.demo.problem import Problem
from kfac_laplace.demo.timing import Stopwatch
from kfac_laplace.demo.training import Fit, train_online, train_plain


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
