"""What a model on the simulated device gives: importable, for processes that have it to their end.

Every function imports the device itself, so that who imports this file does not get it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_laplace import Curvature, Kron, Laplace, MarglikTuner
from kfac_laplace.optim import KFAC

Answers = dict[str, Tensor]
#: Structures of which each has blocks of its own.
STRUCTURES: dict[str, Any] = {
    "kron": "kron",
    "ekfac": "ekfac",
    "diag": "diag",
    "few directions": Kron(4),
    "full": "full",
    "lowrank": "lowrank",
}


def quiet() -> None:
    """Without warnings, in a process that ends with the device."""
    logging.getLogger("kfac_laplace").setLevel(logging.ERROR)


def of_zoo(names: Sequence[str], offload: str | None) -> dict[str, Answers]:
    """Each network fitted on the device, by batches that lie in the CPU's memory."""
    from devices.accelerator import moved
    from zoo.case import build
    from zoo.parted import found

    quiet()
    answers = {}
    for name in names:
        case = build(name)
        la = Laplace(moved(case.model), case.likelihood, offload=offload, **case.options)
        answers[name] = on_cpu(found(case, la.fit(case.batches())))
    return answers


def on_cpu(answers: Mapping[str, Tensor]) -> Answers:
    """All of them on the CPU."""
    return {name: value.detach().cpu() for name, value in answers.items()}


def network(*widths: int) -> nn.Module:
    """A perceptron in float64, the same one each time."""
    torch.manual_seed(0)
    pairs = zip(widths, widths[1:], strict=False)
    layers = [layer for i, o in pairs for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def data(n: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, the same ones each time."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(n, width, dtype=torch.float64, generator=draws, device="cpu")
    return x, torch.randint(classes, (n,), generator=draws, device="cpu")


def answers(structure: str, device: torch.device | str, **options: Any) -> Answers:
    """Everything that users ask of a posterior."""
    x, y = (part.to(device) for part in data(60, 5, 3))
    model = network(5, 12, 12, 3).to(device)
    la = Laplace(model, "classification", hessian_structure=STRUCTURES[structure], **options)
    la.fit([(x[:25], y[:25]), (x[25:50], y[25:50])])
    got = {"evidence": la.log_marginal_likelihood()}
    delta = torch.full((len(la.prior_precision),), 2.0, dtype=torch.float64, device=device)
    delta.requires_grad_()
    got["gradient"] = torch.autograd.grad(la.log_marginal_likelihood(delta), delta)[0]
    for method in ("marglik", "mackay"):
        la.optimize_prior(method, n_steps=10)
        got[method] = la.prior_precision
    for objective in ("exact", "columns", "bounds") if structure == "kron" else ():
        la.optimize_prior(objective=objective, n_steps=3)
        got[objective] = la.prior_precision
    la.prior_precision = la.prior_precision.clamp(0.1, 10)
    la.calibrate()
    got["calibrated"] = la.posterior_scale
    la.posterior_scale = 0.7
    for link in ("probit", "bridge", "mc"):
        got[link] = la.predict(x, link_approx=link).mean
    got["covariance"] = la.predict(x, link_approx="probit").covariance
    if structure == "diag":  # bases of equal eigenvalues are as rounding has them
        draws = torch.Generator().manual_seed(0)
        got["samples"] = la.sample(3, generator=draws)
        got["networks"] = la.predict(x, "nn", n_samples=5).mean
    la.optimize_prior("gridsearch", val_loader=[(x[50:], y[50:])])
    got["held out"] = la.prior_precision
    la.calibrate([(x[50:], y[50:])])
    got["temperature"] = la.predictive_temperature
    return on_cpu(got)


def on_the_device(structure: str, offload: str | None) -> Answers:
    """The same on the device."""
    from devices.accelerator import DEVICE

    quiet()
    return answers(structure, DEVICE, offload=offload)


def trained(device: torch.device | str, **options: Any) -> Answers:
    """A network trained by K-FAC and the tuner, and one whose rounds take the optimiser's averages.

    Args:
        device: where.
        options: of the tuner's curvature.
    """
    x, y = (part.to(device) for part in data(60, 5, 3))
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    got = {}
    for shared in (False, True):
        model = network(5, 12, 3).to(device)
        optimizer = KFAC(model, "classification", lr=0.05, weight_decay=0)
        curvature = {"curvature": optimizer} if shared else {}
        tuner = MarglikTuner(model, "classification", n_data=60, **curvature, **options)
        for _ in range(3):
            for a, b in batches:
                optimizer.zero_grad()
                tuner.loss(model(a), b).backward()
                optimizer.step()
            tuner.step(batches if not shared or not tuner.history else None)
        got[f"weights, {shared}"] = nn.utils.parameters_to_vector(model.parameters())
        got[f"precisions, {shared}"] = tuner.hyperparameters()["prior_precision"]
    return on_cpu(got)


def trained_on_the_device(offload: str | None) -> Answers:
    """The same on the device."""
    from devices.accelerator import DEVICE

    quiet()
    return trained(DEVICE, offload=offload)


def under_a_default_device() -> Answers:
    """A report and more where tensors are made on the device unless they say otherwise."""
    from devices.accelerator import DEVICE

    quiet()
    with torch.device(DEVICE):
        got = answers("kron", DEVICE)
        x, y = data(60, 5, 3)
        la = Laplace(network(5, 8, 3), "classification").fit([(x[:40], y[:40])])
        rows = la.report([(x[40:], y[40:])], resamples=20).rows
        got["nll"] = torch.tensor([row["nll"] for row in rows])
        chosen = torch.arange(7)  # a subnetwork on the device
        part = Laplace(
            network(5, 8, 3), "classification", hessian_structure="full", subset_of_weights=chosen
        )
        got["part"] = part.fit([(x, y)]).log_marginal_likelihood()
    return on_cpu(got)


def on_ranks(structure: str, offload: str | None) -> Answers:
    """A fit of parts by several processes, each with a device; gloo itself knows none."""
    from devices.accelerator import DEVICE

    quiet()
    reduce, broadcast = dist.all_reduce, dist.broadcast
    with (
        patch.object(dist, "all_reduce", lambda t, group: reduce(t.raw, group=group)),
        patch.object(dist, "broadcast", lambda t, rank, group: broadcast(t.raw, rank, group)),
    ):
        return of_parts(structure, DEVICE, dist.get_rank(), offload=offload, process_group="world")


def of_parts(
    structure: str, device: torch.device | str, part: int | None, **options: Any
) -> Answers:
    """Evidence and predictions of a fit to one of two parts of the data, or to both."""
    x, y = (part.to(device) for part in data(60, 5, 3))
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    model = network(5, 12, 12, 3).to(device)
    la = Laplace(model, "classification", hessian_structure=STRUCTURES[structure], **options)
    la.fit(batches if part is None else batches[part : part + 1])
    la.optimize_prior("mackay", n_steps=5)
    la.posterior_scale = 1.0
    got = {"evidence": la.log_marginal_likelihood(), "probit": la.predict(x, "glm", "probit").mean}
    return on_cpu(got)


def merged(structure: str, *offload: str | None) -> Answers:
    """Curvature of two parts of the data, each with an `offload` of its own, and of a third after.

    Args:
        structure: of the curvature.
        offload: of the first, to which the other is added, and of the other.
    """
    from devices.accelerator import DEVICE

    quiet()
    return of_merged(structure, DEVICE, *offload)


def of_merged(
    structure: str, device: torch.device | str, one: str | None, other: str | None
) -> Answers:
    """The same on any device; and what is added to one that has seen nothing."""
    x, y = data(60, 5, 3)
    model = network(5, 12, 12, 3).to(device)

    def begun(offload: Any) -> Curvature:
        kind = STRUCTURES[structure]
        return Curvature(model, "classification", hessian_structure=kind, offload=offload)

    first, second = begun(one).fit([(x[:20], y[:20])]), begun(other).fit([(x[20:40], y[20:40])])
    found = {"none": begun(one).merge(second), "some": first.merge(second)}
    got = {}
    for name, curvature in found.items():
        curvature.accumulate(x[40:], y[40:])
        got |= {f"{name} {key}": block.dense() for key, block in curvature.blocks.items()}
    return on_cpu(got)


def diagonal_words(offload: str | None) -> Answers:
    """What laplace-torch calls the precision of a diagonal posterior, beside its prior."""
    from devices.accelerator import DEVICE

    quiet()
    return of_diagonal_words(DEVICE, offload=offload)


def of_diagonal_words(device: torch.device | str, **options: Any) -> Answers:
    """The same on any device."""
    model = network(5, 12, 3).to(device)
    la = Laplace(model, "classification", hessian_structure="diag", **options)
    la.fit([data(60, 5, 3)])
    assert la.H.device == la.posterior_precision.device == la.mean.device
    return on_cpu({"H": la.H, "precision": la.posterior_precision})
