"""Ways to predict with a trained network: the network itself, and posteriors around it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.demo import metrics
from kfac_laplace.demo.data import loader
from kfac_laplace.demo.problem import Problem, in_order
from kfac_laplace.demo.timing import Stopwatch
from kfac_laplace.demo.training import Fit
from kfac_laplace.likelihoods.links import Link


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


def posterior(la: Laplace, seconds: float, curvature_seconds: float, link: Link = "auto") -> Answer:
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
