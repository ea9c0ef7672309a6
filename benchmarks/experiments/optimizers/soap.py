"""The control: Adam in the eigenbases of the gradients' own covariances, after SOAP."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_laplace.optim.decomposition import BasesTable
from kfac_laplace.optim.rules import AdamW, EigenAdam, Update, descend_
from kfac_laplace.optim.schedule import EARLY

#: Weights of these layers have bases; K-FAC covers the same ones of the networks here.
LAYERS = (nn.Linear, nn.Conv2d)


class GradientBases(Optimizer):
    """The rule, the intervals and the averages of `KFAC`, with GGᵀ and GᵀG for B and A.

    So a difference to `KFAC` is one of the bases, and of biases, which are not a column here but
    updated by AdamW, as in SOAP, with all that has no bases.

    Source: Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", algorithm 3; bases by
    full decompositions in place of its QR iteration.

    Args:
        model: whose layers tell which parameters are matrices.
        params: parameter groups.
        lr: learning rate.
        weight_decay: decoupled.
        betas: decays of the averages of gradients and of their squares.
        every: steps between two covariances.
        bases_every: steps between two decompositions.
        ema: decay of the averages of covariances.
        largest: a side wider than this stays in its own coordinates.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        every: int = 5,
        bases_every: int = 10,
        ema: float = 0.95,
        largest: int = 4096,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._rule, self._others = EigenAdam(betas), AdamW(betas)
        self._every, self._ema, self._steps = every, ema, 0
        own = {id(p) for group in self.param_groups for p in group["params"]}
        self._matrices = {
            name: layer.weight
            for name, layer in model.named_modules()
            if isinstance(layer, LAYERS) and id(layer.weight) in own
        }
        self._table = BasesTable(
            {name: (1, len(p), p[0].numel()) for name, p in self._matrices.items()},
            every=bases_every,
            largest=largest,
        )
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Average covariances where that is due, and update all parameters that have gradients."""
        self._steps += 1
        matrices = {n: p for n, p in self._matrices.items() if p.grad is not None}
        gradients = [_matrix(p.grad) for p in matrices.values()]
        for p, gradient in zip(matrices.values(), gradients, strict=True):
            if p not in self.state:
                self.state[p] = self._rule.init(gradient)
        if self._steps in EARLY or (self._steps - 1) % self._every == 0:
            for name, gradient in zip(matrices, gradients, strict=True):
                self._average(name, gradient)
        names, states = list(matrices), [self.state[p] for p in matrices.values()]
        before = self._table.eigenbases(names, gradients)
        if self._table.update(self._steps, self._factors):
            self._rule.turn(states, before, self._table.eigenbases(names, gradients))
        bases = self._table.eigenbases(names, gradients)
        updates = self._rule.lengths(self._rule.directions(gradients, states, bases), [])
        steps = {
            p: update.of(partial(torch.reshape, shape=p.shape))
            for p, update in zip(matrices.values(), updates, strict=True)
        }
        self._descend(steps | self._by_adam(steps))

    def _average(self, name: str, gradient: Tensor) -> None:
        """Add the covariances of a gradient (1, o, i); their scale is no matter for the bases."""
        new = gradient @ gradient.mT, gradient.mT @ gradient
        old = self._factors.get(name)
        if old is None:
            self._factors[name] = new
        else:
            for mean, one in zip(old, new, strict=True):
                mean.lerp_(one, 1 - self._ema)

    def _by_adam(self, done: dict[Tensor, Update]) -> dict[Tensor, Update]:
        """Updates of the parameters without bases."""
        everything = [p for group in self.param_groups for p in group["params"]]
        rest = [p for p in everything if p.grad is not None and p not in done]
        for p in rest:
            if p not in self.state:
                self.state[p] = self._others.init(p.grad)
        found = self._others.directions([p.grad for p in rest], [self.state[p] for p in rest])
        return {p: one.update for p, one in zip(rest, found, strict=True)}

    def _descend(self, steps: dict[Tensor, Update]) -> None:
        """Take the steps, group by group."""
        for group in self.param_groups:
            own = [p for p in group["params"] if p in steps]
            rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            descend_(own, [steps[p] for p in own], **rates)

    def kept(self) -> dict[str, Any]:
        """The tensors beside the moments: factors and bases."""
        return {"factors": self._factors, "bases": self._table.state_dict()}


def _matrix(gradient: Tensor) -> Tensor:
    """(o, ...) as (1, o, i)."""
    return gradient.flatten(1).unsqueeze(0)
