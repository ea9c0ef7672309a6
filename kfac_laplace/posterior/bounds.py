"""How far a search for hyperparameters goes, and which precisions it leaves alone.

The evidence need not have a maximum. In the precision of parameters that equal their prior mean it
rises for ever, in that of parameters without curvature it falls for ever, and with residuals of
zero it rises for ever as σ falls. A search then ends where `REACH` says, not where float64 does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.objectives import Objective
from kfac_laplace.posterior.objectives.evidence import log_marginal_likelihood

#: A positive hyperparameter goes at most so many times as far up, or down, as where it started.
REACH = 1e8
#: Slopes of so much of the tolerance are below it, with all rounding.
FLAT = 0.9
#: Values within this of an end of the range sit on it: exp(log x) is not x to the last bit.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Bounds:
    """A range for each positive hyperparameter that moves, and the precisions that do not.

    Args:
        low: lower ends by name, shaped as the values; δ as (length of the prior,).
        high: upper ends likewise.
        unused: precisions of parameters without effect, (length of the prior,). They stay.
        blind: precisions of other parameters without curvature, likewise. They stay where a search
            puts them first.
        raised: precisions put to the upper end, where the evidence only rises. They stay.
    """

    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    unused: Tensor
    blind: Tensor
    raised: Tensor

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        objective: Objective,
        free: tuple[str, ...],
        start: Hyperparameters | None = None,
    ) -> "Bounds":
        """Bounds around a start.

        Args:
            posterior: at today's hyperparameters, δ of every precision.
            objective: what is maximised. Only of the evidence it is known where it has no maximum.
            free: names of the hyperparameters that move.
            start: where tuning began; the posterior's hyperparameters by default.
        """
        now = posterior.hyperparameters.detached().values()
        first = now if start is None else start.detached().values()
        rows = posterior.hyperparameters.rows()
        low, high = {}, {}
        for name in free:
            transform = rows[name].transform
            if transform is not None and transform.positive:
                low[name] = torch.minimum(first[name] / REACH, now[name])
                high[name] = torch.maximum(first[name] * REACH, now[name])
        unused = posterior.unused_precisions
        blind = torch.zeros_like(unused)
        if objective is log_marginal_likelihood:
            blind = _without_curvature(posterior) & ~unused
        return cls(low, high, unused, blind, torch.zeros_like(unused))

    @property
    def stays(self) -> Tensor:
        """The precisions that do not move."""
        return self.unused | self.blind | self.raised

    def begun(
        self, posterior: Posterior, objective: Objective, tolerance: float
    ) -> tuple[Posterior, "Bounds"]:
        """The posterior with those precisions in their places of which these are known.

        The evidence rises without end in the precision of parameters at their prior mean: to the
        upper end with it. It falls without end in that of parameters without curvature: down, to
        where no more than the tolerance is left to gain, in nats per unit of log δ, and no further.
        A precision that gains no more than that is left alone.
        """
        if objective is not log_marginal_likelihood or "prior_precision" not in self.high:
            return posterior, self
        with torch.no_grad():
            hyper = posterior.hyperparameters.detached()
            delta, squares = hyper.prior_precision, posterior.squares
            rises = 0.5 * posterior.effective_dimensions() > tolerance
            raised = (squares == 0) & rises & ~self.stays
            falls = self.blind & (0.5 * delta * squares > tolerance)
            if not bool((raised | falls).any()):
                return posterior, self
            low, high = self.low["prior_precision"], self.high["prior_precision"]
            flat = torch.maximum(low, FLAT * 2 * tolerance / squares)
            delta = torch.where(raised, high, torch.where(falls, flat, delta))
        moved = posterior.at(replace(hyper, prior_precision=delta))
        return moved, replace(self, raised=raised)

    def inside(self, moved: Hyperparameters, before: Hyperparameters) -> Hyperparameters:
        """Values inside the range; what stays is as it was before."""
        values = {
            name: getattr(moved, name).clamp(self.low[name], self.high[name]) for name in self.low
        }
        if "prior_precision" in values:
            old = before.prior_precision
            values["prior_precision"] = torch.where(self.stays, old, values["prior_precision"])
        return replace(moved, **values)

    def ends(self, hyper: Hyperparameters) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name by name, which entries sit at the lower end or below, and at the upper or above."""
        for name in self.low:
            value = getattr(hyper, name).detach()
            below = value <= self.low[name] * (1 + ROUNDING)
            above = value >= self.high[name] * (1 - ROUNDING)
            yield name, below, above

    def inward(self, hyper: Hyperparameters, name: str, slope: Tensor) -> Tensor:
        """A slope in the free coordinate, 0 where it leads out of the range or the entry stays.

        Args:
            hyper: where it was taken.
            name: of the hyperparameter.
            slope: of what is maximised, shaped as the hyperparameter.
        """
        for other, below, above in self.ends(hyper):
            if other == name:
                slope = slope.masked_fill((below & (slope < 0)) | (above & (slope > 0)), 0)
        return slope.masked_fill(self.stays, 0) if name == "prior_precision" else slope


def _without_curvature(posterior: Posterior) -> Tensor:
    """Precisions of parameters in which the log-likelihood is flat, (length of the prior,)."""
    with torch.no_grad():
        # Rounding alone: full blocks have their γ as differences from 1.
        rounding = 4 * torch.finfo(torch.float64).eps * posterior.prior.counts
        return posterior.effective_dimensions() <= rounding
