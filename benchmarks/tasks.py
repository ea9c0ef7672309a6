"""What each suite runs: a task of one contender, and the training step beside it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.cases import Case
from benchmarks.models import Size, build, draw, freeze_all_but_linear_layers
from benchmarks.passes import curvature_pass, loader, posterior
from benchmarks.resources import Clock

Extras = dict[str, float]
HYPER_STEPS = {"evidence": 100, "online": 50}
EPOCHS = 5
FITTED_ON = 8


@dataclass(frozen=True)
class Task:
    """What is timed.

    Args:
        run: the work; returns what else it found, to be called after the clock has stopped.
        step: one training forward and backward of the same batch, to compare with.
        once: whether a second run would find its work done.
    """

    run: Callable[[], Callable[[], Extras]]
    step: Callable[[], None]
    once: bool = False


def make(contender: str, case: Case, device: str) -> Task:
    """The task of a contender in a case, on weights and data drawn from fixed seeds."""
    return SUITES[case.suite](contender, case, device)


def rehearsal(case: Case) -> Case:
    """A case of no size that brings in whatever is imported on first use."""
    size = Size(width=8, depth=1)
    return Case(case.suite, "mlp", 4, 3, case.approx, case.fisher, size, case.axis, 1)


class Setting:
    """A network as the contender takes it, the same with all its parameters, and a batch."""

    def __init__(self, contender: str, case: Case, device: str):
        self.contender, self.case, self.device = contender, case, device
        self.plain = build(case.network, case.classes, case.size).to(device)
        self.model = copy.deepcopy(self.plain)
        if contender != "ours-all":
            freeze_all_but_linear_layers(self.model)
        self.x, self.y = self.data(case.batch)

    def data(self, examples: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        x, y = draw(self.case.network, examples, self.case.classes, self.case.size)
        return x.to(self.device), y.to(self.device)

    def step(self) -> None:
        """One forward and backward of the batch, for the gradient of every parameter."""
        self.plain.zero_grad()
        nn.functional.cross_entropy(self.plain(self.x), self.y).backward()

    def fitted(self) -> Any:
        """A posterior fitted to a few examples: what follows costs the same after many."""
        la = posterior(self.contender, self.model, self.case)
        la.fit(loader(*self.data(FITTED_ON)))
        return la


def fit(contender: str, case: Case, device: str) -> Task:
    """A curvature pass over one batch."""
    setting = Setting(contender, case, device)
    one = curvature_pass(contender, setting.model, case)

    def run() -> Callable[[], Extras]:
        trace = one(setting.x, setting.y)
        return lambda: {"trace": trace()}

    return Task(run, setting.step)


def evidence(contender: str, case: Case, device: str) -> Task:
    """Eigenvalues of a fitted curvature, then 100 steps of Adam on the log-precisions."""
    setting, clock = Setting(contender, case, device), Clock(device)
    la = setting.fitted()

    def run() -> Callable[[], Extras]:
        start = clock()
        if contender == "ours-laplace":
            for block in la.curvature.blocks.values():
                _ = block.spectrum
        else:
            la.H_facs.decompose()
        seconds = clock() - start
        value = climb(la, contender, HYPER_STEPS["evidence"], device)
        return lambda: {"decomposition_seconds": seconds, "log_evidence": float(value)}

    return Task(run, setting.step, once=True)


def climb(la: Any, contender: str, steps: int, device: str) -> Tensor:
    """Steps of Adam on the log-precisions of layers (ours) or tensors (laplace-torch)."""
    count = len(la.prior_precision) if contender == "ours-laplace" else la.n_layers
    log_precision = torch.zeros(count, device=device, requires_grad=True)
    adam = torch.optim.Adam([log_precision], lr=0.1)
    for _ in range(steps):
        adam.zero_grad()
        loss = -la.log_marginal_likelihood(log_precision.exp())
        loss.backward()
        adam.step()
    return -loss.detach()


def predict(contender: str, case: Case, device: str) -> Task:
    """GLM probabilities of a fitted posterior that has predicted before."""
    setting = Setting(contender, case, device)
    la = setting.fitted()
    la(setting.x[:1], pred_type="glm", link_approx="probit")

    def run() -> Callable[[], Extras]:
        probs = la(setting.x, pred_type="glm", link_approx="probit")
        return lambda: {"confidence": float(probs.max(-1).values.mean())}

    return Task(run, setting.step)


def online(contender: str, case: Case, device: str) -> Task:
    """Five epochs on the negative log joint and a round, against five plain epochs."""
    setting = Setting(contender, case, device)
    batches = loader(*setting.data(case.batch * case.batches), batch=case.batch)

    def plain() -> None:
        train(setting.plain, batches, nn.functional.cross_entropy)

    if contender == "ours-laplace":
        return Task(tuned(setting, batches), plain)
    loss = negative_log_joint(setting.model, len(batches.dataset))

    def run() -> Callable[[], Extras]:
        train(setting.model, batches, loss)
        la = posterior(contender, setting.model, case)
        la.fit(batches)
        value = climb(la, contender, HYPER_STEPS["online"], device)
        return lambda: {"log_evidence": float(value)}

    return Task(run, plain)


def tuned(setting: Setting, batches: Any) -> Callable[[], Callable[[], Extras]]:
    """Training with our tuner."""
    from kfac_laplace import MarglikTuner

    case = setting.case
    tuner = MarglikTuner(
        setting.model,
        "classification",
        len(batches.dataset),
        kfac_approx=case.approx,  # type: ignore[arg-type]  # a plain string in a case
        fisher=case.fisher,
        marglik_frequency=EPOCHS,
        n_hypersteps=HYPER_STEPS["online"],
    )

    def run() -> Callable[[], Extras]:
        train(setting.model, batches, tuner.loss)
        record = tuner.step(batches, epoch=EPOCHS)
        assert record is not None
        return lambda: {"log_evidence": record.evidence}

    return run


def train(model: nn.Module, batches: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Five epochs of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(EPOCHS):
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()


def negative_log_joint(model: nn.Module, n_data: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as laplace-torch's own training has it, at unit precisions."""
    params = [p for p in model.parameters() if p.requires_grad]
    delta = torch.cat([torch.ones_like(p).flatten() for p in params])

    def loss(f: Tensor, y: Tensor) -> Tensor:
        theta = parameters_to_vector(params)
        return nn.functional.cross_entropy(f, y) + 0.5 * (delta * theta) @ theta / n_data

    return loss


SUITES = {
    "fit": fit,
    "evidence": evidence,
    "predict": predict,
    "online": online,
    "scaling": fit,
}
