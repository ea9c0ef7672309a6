"""The methods of the image experiment: a function each, from a problem to what came out."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments import settings
from benchmarks.experiments.clock import Clock
from benchmarks.experiments.measures import logits_of, of_mode, of_posterior, quality
from benchmarks.experiments.problem import Problem, temperature_of
from benchmarks.experiments.training import Fit, Rounds, train
from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.demo.metrics import nll
from kfac_laplace.posterior.objectives.registry import NAMED

Found = dict[str, Any]
Method = Callable[[Problem], Found]


# --- what is measured of a fit -------------------------------------------------------------------


def softmax_of(model: nn.Module, temperature: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Probabilities of the network itself."""
    return lambda x: (logits_of(model, x) / temperature).softmax(-1)


def mode(problem: Problem, fit: Fit, temperature: float = 1.0) -> Found:
    """Quality of the network's own probabilities, what it is on its training images, and costs."""
    probs, (x, y) = softmax_of(fit.model, temperature), problem.images.train
    found = of_mode(probs, problem.images, problem.tests.posterior)
    return found | {"train_nll": nll(probs(x), y)} | fit.costs


def in_order(problem: Problem) -> Rounds:
    """The training images without augmentation."""
    return Rounds(problem.images.train)


def evidence_of(problem: Problem, fit: Fit) -> Found:
    """The evidence of a network under the prior that its weight decay is."""
    assert fit.weight_decay is not None
    prior = fit.weight_decay * problem.size
    la = Laplace(fit.model, "classification", prior_precision=prior).fit(in_order(problem))
    return {"evidence": float(la.log_marginal_likelihood())}


# --- weight decay --------------------------------------------------------------------------------


def plain(problem: Problem) -> Found:
    """The usual weight decay."""
    fit = problem.plain
    return mode(problem, fit) | evidence_of(problem, fit)


def fixed(problem: Problem) -> Found:
    """A prior precision of 1, which is a weight decay of 1/N."""
    fit = problem.plainly(problem.images.train, 1 / problem.size)
    return mode(problem, fit) | evidence_of(problem, fit)


def grid(problem: Problem) -> Found:
    """A weight decay chosen on a fifth of the images, then training on all of them."""
    clock, (held_out, kept) = Clock(problem.device), problem.held_out
    scores = {
        decay: quality(softmax_of(problem.plainly(kept, decay).model)(held_out.x), held_out.y)
        for decay in settings.GRID
    }
    best = min(scores, key=lambda decay: scores[decay]["nll"])
    fit = problem.plainly(problem.images.train, best)
    costs = clock()
    return mode(problem, fit) | evidence_of(problem, fit) | costs | {"weight_decay": best}


def temperature(problem: Problem) -> Found:
    """Plain training on four fifths; the rest of the images choose the temperature.

    Measures that begin with "refit_" are those of plain training on all images at that temperature.
    """
    chosen = temperature_of(problem.partly, problem.held_out[0])
    found = mode(problem, problem.partly, chosen)
    refit = mode(problem, problem.plain, chosen)
    found |= {f"refit_{name}": refit[name] for name in ("nll", "ece", "brier", "accuracy")}
    return found | {"temperature": chosen}


def ensemble(problem: Problem) -> Found:
    """The mean of the probabilities of five plain networks with weights and orders of their own."""
    data = problem.images.train
    others = [
        problem.plainly(data, settings.PLAIN, member) for member in range(1, settings.MEMBERS)
    ]
    fits = [problem.plain, *others]
    each = [softmax_of(fit.model) for fit in fits]

    def probs(x: Tensor) -> Tensor:
        return torch.stack([one(x) for one in each]).mean(0)

    costs = {name: sum(fit.costs[name] for fit in fits) for name in problem.plain.costs}
    found = of_mode(probs, problem.images, problem.tests.posterior)
    return found | {"train_nll": nll(probs(data.x), data.y)} | costs


# --- the tuner -----------------------------------------------------------------------------------


def tuned(**options: Any) -> Method:
    """Tuned while training, and predictions of the posterior as the library makes them.

    Args:
        options: of the tuner; those of "tuned" are its defaults but for the frequency of rounds.
    """

    def method(problem: Problem) -> Found:
        model = problem.model()
        tuner = MarglikTuner(
            model, "classification", problem.size, marglik_frequency=settings.FREQUENCY, **options
        )
        fit = train(model, problem.images.train, problem.recipe(), tuner=tuner)
        return (
            mode(problem, fit) | history(tuner) | around(problem, tuner.laplace(in_order(problem)))
        )

    return method


def history(tuner: MarglikTuner) -> Found:
    """Where hyperparameters began to move, where they ended, and what rounds cost."""
    records = tuner.history
    values = [record.hyperparameters["prior_precision"] for record in records]
    moved = [
        record.epoch
        for record, before, now in zip(records[1:], values, values[1:], strict=False)
        if not torch.equal(before, now)
    ]
    final = tuner.hyperparameters()["prior_precision"].tolist()
    return {
        "first_move": moved[0] if moved else None,
        "precisions": dict(zip(tuner.groups, final, strict=True)),
        "effective_dimensions": float(records[-1].effective_dimensions.sum()),
        "constant_evidence": records[-1].constant_evidence,
        "rounds": len(records),
        "round_seconds": sum(record.seconds for record in records),
    }


def around(problem: Problem, la: Laplace) -> Found:
    """Evidence and predictions of a posterior."""
    found = of_posterior(la, problem.images, problem.tests.posterior)
    return {"evidence": float(la.log_marginal_likelihood())} | found


# --- posteriors around plain networks ------------------------------------------------------------


def post_hoc(subset: str) -> Method:
    """A posterior around the plain network, its prior by the evidence."""

    def method(problem: Problem) -> Found:
        fit = problem.plain
        la = Laplace(fit.model, "classification", subset_of_weights=subset)
        la.fit(in_order(problem)).optimize_prior()
        return mode(problem, fit) | around(problem, la)

    return method


def validated(problem: Problem) -> Found:
    """A posterior around the network of `temperature`, with the same images to choose scales."""
    fit, (held_out, kept) = problem.partly, problem.held_out
    la = Laplace(fit.model, "classification")
    la.fit(Rounds(kept), val_loader=Rounds(held_out))
    la.optimize_prior()
    return mode(problem, fit) | around(problem, la)


def laplace_torch(problem: Problem) -> Found:
    """laplace-torch's own training with K-FAC (expand), at the same rate of rounds.

    It keeps the weights of the highest evidence. It takes networks of plain layers alone, and sees
    images in an order of its own.
    """
    from laplace.marglik_training import marglik_training
    from torch.utils.data import DataLoader, TensorDataset

    recipe, clock, data = problem.recipe(), Clock(problem.device), problem.images.train
    loader = DataLoader(
        TensorDataset(*data),
        batch_size=recipe.batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(recipe.order),
    )
    _, model, minus_evidences, _ = marglik_training(
        problem.model(),
        loader,
        "classification",
        optimizer_kwargs={"lr": settings.LEARNING_RATE[problem.network]},
        scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
        # its schedule moves after each batch
        scheduler_kwargs={"T_max": recipe.epochs * len(loader)},
        n_epochs=recipe.epochs,
        n_epochs_burnin=recipe.epochs // 10,
        marglik_frequency=settings.FREQUENCY,
    )
    fit = Fit(model.eval(), costs=clock())
    return mode(problem, fit) | {"evidence": -float(min(minus_evidences))}


METHODS: dict[str, Method] = {
    "plain": plain,
    "fixed": fixed,
    "grid": grid,
    "tuned": tuned(),
    "temperature": temperature,
    "ensemble": ensemble,
    "tuned-expand": tuned(kfac_approx="expand"),
    "tuned-reduce": tuned(kfac_approx="reduce"),
    "tuned-columns": tuned(objective="columns"),
    "tuned-exact": tuned(objective="exact"),
    "last-layer": post_hoc("last_layer"),
    "post-hoc": post_hoc("all"),
    "validated": validated,
    "laplace-torch": laplace_torch,
}


def available() -> list[str]:
    """The methods that the installed library has what they need for."""
    needs = {
        "tuned-columns": "columns" in NAMED,
        "tuned-exact": "exact" in NAMED,
        "validated": "val_loader" in inspect.signature(Laplace.fit).parameters,
    }
    return [name for name in METHODS if needs.get(name, True)]


def takes_part(method: str, network: str, size: int, augment: bool) -> bool:
    """Whether a method is meant for a cell."""
    if method == "tuned-exact":
        return size <= settings.EXACT_UP_TO
    if method == "laplace-torch":
        return network in ("cnn", "mlp") and not augment
    return True
