"""The classification half: every method on every network, all sharing what a seed draws."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from kfac_laplace.demo import metrics
from kfac_laplace.demo.answers import Answer, Prediction
from kfac_laplace.demo.data import Images, digits
from kfac_laplace.demo.methods import METHODS, Method
from kfac_laplace.demo.problem import Problem
from kfac_laplace.demo.settings import Settings
from kfac_laplace.demo.timing import Stopwatch
from kfac_laplace.demo.training import Fit

CHUNK = 256  # inputs in one call of a predictive


@dataclass(frozen=True)
class Outcome:
    """One row: a method on a network under one seed, measured on the test set.

    Attributes:
        model: name of the network.
        method: name of the method.
        seed: seed of split, initial weights and batch order.
        accuracy: share of test images whose most probable class is right.
        nll: mean negative log probability of the right class, in nats.
        ece: expected calibration error over 15 bins.
        brier: squared distance to the one-hot label, summed over classes.
        ood_auroc: area under the ROC curve of the predictive entropy, test images against patches.
        ood_score_auroc: the same by the posterior's score; None where there is no posterior.
        log_evidence: log marginal likelihood of the training images by the method's own curvature
            (the default's for plain training), in nats.
        seconds: training and posterior, without prediction.
        curvature_seconds: the part of it that went into curvature.
        predict_seconds: predicting test images and patches.
        training_runs: networks trained to arrive here.
        weight_decay: the weight decay of plain training, chosen or given; None for tuned networks.
        posterior_scale: κ, the factor on the predictive covariance; None without a posterior.
        temperature: what predictions divide logits by; None where they know of none.
    """

    model: str
    method: str
    seed: int
    accuracy: float
    nll: float
    ece: float
    brier: float
    ood_auroc: float
    ood_score_auroc: float | None
    log_evidence: float
    seconds: float
    curvature_seconds: float
    predict_seconds: float
    training_runs: int
    weight_decay: float | None
    posterior_scale: float | None
    temperature: float | None


@dataclass(frozen=True)
class Result:
    """An outcome with what the pictures need: probabilities (n, c), labels (n,), and the fit."""

    outcome: Outcome
    probs: Tensor
    labels: Tensor
    fit: Fit


def classification(settings: Settings) -> Iterator[Result]:
    """Run the half, yielding each result as soon as it is there."""
    plan = [(settings.seed + k, name) for name in settings.models for k in range(settings.seeds)]
    with tqdm(total=len(plan) * len(METHODS), disable=None, leave=False) as bar:
        for seed, name in plan:
            data = draw(settings, seed)
            problem = Problem(name, data, settings, seed)
            fits: dict[Callable[[Problem], Fit], Fit] = {}
            for method in METHODS:
                bar.set_description(f"{name}, seed {seed}: {method.name}")
                if method.train not in fits:
                    fits[method.train] = method.train(problem)
                yield measure(method, fits[method.train], problem)
                bar.update()


def draw(settings: Settings, seed: int) -> Images:
    """The images that all methods see under one seed."""
    return digits(settings.n_train, settings.n_test, settings.n_ood, seed, settings.device)


def measure(method: Method, fit: Fit, problem: Problem) -> Result:
    """Predict the test images and the patches, and score the predictions."""
    answer = method.answer(fit, problem)
    test, ood = problem.data.test, problem.data.ood
    clock = Stopwatch(test.x)
    (probs, score), (ood_probs, ood_score) = in_chunks(answer, test.x), in_chunks(answer, ood)
    predict_seconds = clock()
    outcome = Outcome(
        model=problem.name,
        method=method.name,
        seed=problem.seed,
        accuracy=metrics.accuracy(probs, test.y),
        nll=metrics.nll(probs, test.y),
        ece=metrics.ece(probs, test.y),
        brier=metrics.brier(probs, test.y),
        ood_auroc=metrics.auroc(metrics.entropy(probs), metrics.entropy(ood_probs)),
        ood_score_auroc=(
            None if score is None or ood_score is None else metrics.auroc(score, ood_score)
        ),
        log_evidence=answer.log_evidence,
        seconds=fit.seconds + answer.seconds,
        curvature_seconds=fit.curvature_seconds + answer.curvature_seconds,
        predict_seconds=predict_seconds,
        training_runs=fit.runs,
        weight_decay=fit.weight_decay,
        posterior_scale=answer.posterior_scale,
        temperature=answer.temperature,
    )
    return Result(outcome, probs.cpu(), test.y.cpu(), fit)


def in_chunks(answer: Answer, x: Tensor) -> Prediction:
    """The prediction for inputs (n, ...), a few hundred at a time."""
    found = [answer.predict(chunk) for chunk in x.split(CHUNK)]
    scores = [part.ood_score for part in found if part.ood_score is not None]
    probs = torch.cat([part.probs for part in found])
    return Prediction(probs, torch.cat(scores) if scores else None)
