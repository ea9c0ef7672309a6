"""The methods, each with the ranges of its settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.experiments.fixup import WideResNet
from benchmarks.experiments.optimizers.peers import asdl_gradients, lacking, shampoo
from benchmarks.experiments.optimizers.ranges import (
    Choice,
    Decay,
    Even,
    Logarithmic,
    Range,
    Setting,
)
from benchmarks.experiments.optimizers.task import mean_loss

#: Decay of the average of gradients of all methods after Adam.
BETA1 = 0.9
SCHEDULE: dict[str, Range] = {
    "warmup": Even(0.02, 0.1),
    "decay": Choice(("cosine", "linear")),
}
#: Weight decay is decoupled: per unit of the learning rate.
AS_ADAM: dict[str, Range] = {
    "lr": Logarithmic(1e-3, 0.2),
    "weight_decay": Logarithmic(1e-3, 0.5),
    "beta2": Decay(1e-3, 0.1),
    **SCHEDULE,
}
#: Weight decay is a part of the gradient.
AS_SGD: dict[str, Range] = {
    "lr": Logarithmic(1e-2, 1.0),
    "weight_decay": Logarithmic(1e-5, 1e-2),
    "momentum": Decay(0.02, 0.2),
    **SCHEDULE,
}
#: Where the curvature is small a step is lr / damping: most of the rates of SGD diverge.
DAMPED: dict[str, Range] = {
    **AS_SGD,
    "lr": Logarithmic(1e-4, 0.3),
    "damping": Logarithmic(1e-3, 0.3),
}


@dataclass(frozen=True)
class Stepper:
    """A step of training on a batch.

    Args:
        optimizer: updates parameters from their gradients.
        gradients: fills the gradients of the mean loss of inputs and labels.
    """

    optimizer: Optimizer
    gradients: Callable[[Any, Tensor], None]

    def __call__(self, x: Any, y: Tensor) -> None:
        """Inputs and labels of a batch."""
        self.optimizer.zero_grad()
        self.gradients(x, y)
        self.optimizer.step()


Settings = Mapping[str, Setting]
Make = Callable[[nn.Module, Settings, int], Stepper]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        make: a stepper of a network, settings and the seed of what the method draws.
        ranges: of its settings.
        first_order: whether it counts among those that set the target.
        lacks: why it cannot run here, or None.
        elsewhere: whether it keeps tensors that its optimiser's state does not show.
    """

    make: Make
    ranges: Mapping[str, Range]
    first_order: bool = False
    lacks: Callable[[], str | None] = lambda: None
    elsewhere: bool = False


def groups_of(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """All parameters; Fixup's scalars learn at a tenth of the rate under every method."""
    scalars = model.scalars() if isinstance(model, WideResNet) else []
    few = {id(p) for p in scalars}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in few]}]
    return [*groups, {"params": scalars, "lr": lr / 10}] if scalars else groups


def plain(model: nn.Module, optimizer: Optimizer) -> Stepper:
    """An optimiser that takes gradients as they are."""

    def gradients(x: Any, y: Tensor) -> None:
        mean_loss(model(x), y).backward()

    return Stepper(optimizer, gradients)


def sgd(model: nn.Module, s: Any, seed: int) -> Stepper:
    """SGD with Nesterov's momentum."""
    common = {"momentum": s["momentum"], "weight_decay": s["weight_decay"], "nesterov": True}
    return plain(model, torch.optim.SGD(groups_of(model, s["lr"]), lr=s["lr"], **common))


def adamw(model: nn.Module, s: Any, seed: int) -> Stepper:
    """AdamW."""
    common = {"betas": (BETA1, s["beta2"]), "weight_decay": s["weight_decay"]}
    return plain(model, torch.optim.AdamW(groups_of(model, s["lr"]), lr=s["lr"], **common))


def nadamw(model: nn.Module, s: Any, seed: int) -> Stepper:
    """Adam with Nesterov's momentum and decoupled weight decay."""
    common = {"betas": (BETA1, s["beta2"]), "weight_decay": s["weight_decay"]}
    groups = groups_of(model, s["lr"])
    return plain(
        model, torch.optim.NAdam(groups, lr=s["lr"], decoupled_weight_decay=True, **common)
    )


def soap(model: nn.Module, s: Any, seed: int) -> Stepper:
    """The rule of ours in bases of the gradients."""
    from benchmarks.experiments.optimizers.soap import GradientBases

    groups, betas = groups_of(model, s["lr"]), (BETA1, s["beta2"])
    common = {"lr": s["lr"], "weight_decay": s["weight_decay"], "betas": betas}
    return plain(model, GradientBases(model, groups, **common))


def grafted_shampoo(model: nn.Module, s: Any, seed: int) -> Stepper:
    """Shampoo of `pytorch_optimizer`."""
    common = {name: s[name] for name in ("lr", "weight_decay", "beta2")}
    return plain(model, shampoo(groups_of(model, s["lr"]), **common))


def asdl(model: nn.Module, s: Any, seed: int) -> Stepper:
    """SGD on gradients preconditioned by ASDL."""
    optimizer = sgd(model, s, seed).optimizer
    return Stepper(optimizer, asdl_gradients(model, s["damping"]))


def kfac(approx: str) -> Make:
    """Ours, at its default intervals."""

    def make(model: nn.Module, s: Any, seed: int) -> Stepper:
        from kfac_laplace.optim import KFAC, EigenAdam

        optimizer = KFAC(
            model,
            "classification",
            groups_of(model, s["lr"]),
            lr=s["lr"],
            weight_decay=s["weight_decay"],
            rule=EigenAdam((BETA1, s["beta2"])),
            kfac_approx=approx,
            seed=seed,
        )
        return plain(model, optimizer)

    return make


def without_kfac() -> str | None:
    """Why ours cannot run."""
    import kfac_laplace.optim

    return None if hasattr(kfac_laplace.optim, "KFAC") else "kfac_laplace.optim has no KFAC yet"


METHODS: dict[str, Method] = {
    "sgd": Method(sgd, AS_SGD, first_order=True),
    "adamw": Method(adamw, AS_ADAM, first_order=True),
    "nadamw": Method(nadamw, AS_ADAM, first_order=True),
    "soap": Method(soap, AS_ADAM),
    "shampoo": Method(
        grafted_shampoo,
        AS_ADAM,
        lacks=lambda: lacking("pytorch_optimizer", "pytorch-optimizer"),
        elsewhere=True,
    ),
    "asdl": Method(asdl, DAMPED, lacks=lambda: lacking("asdl", "asdfghjkl"), elsewhere=True),
    "expand": Method(kfac("expand"), AS_ADAM, lacks=without_kfac),
    "reduce": Method(kfac("reduce"), AS_ADAM, lacks=without_kfac),
}
