"""How far a search for hyperparameters goes, and which precisions it leaves alone.

The evidence need not have a maximum. In the precision of parameters that equal their prior mean it
rises for ever, and with residuals of zero it rises for ever as σ falls. What it has to gain by a
precision is bounded all the same: as a function of δ its share −½ [log det(1 + H/δ) + δ‖θ − μ‖²] is
never above 0, and about −½ (γ + δ‖θ − μ‖²) where both are small. So an end of the range is an end
where both are, and elsewhere the range moves on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.objectives import CountsDimensions, Objective
from kfac_laplace.posterior.objectives.evidence import dimensions_of

#: A positive hyperparameter goes at first so many times as far up, or down, as where it started.
REACH = 1e8
#: Half of γ and of δ‖θ − μ‖² below which a precision has next to nothing to gain, in nats.
LITTLE = 1e-2
#: Values within this of an end of the range sit on it: exp(log x) is not x to the last bit.
ROUNDING = 1e-9
#: Curvature of an entry that is none, beside the largest of all: what rounding leaves of zero.
NO_CURVATURE = 1e-28
#: Residuals that are none, beside the spread of the targets.
NO_RESIDUALS = 1e-8
#: Ranges stay within what float64 can take as a precision, and as a noise.
FARTHEST = {"prior_precision": 1e280, "sigma_noise": 1e90}


@dataclass(frozen=True)
class Bounds:
    """A range for each positive hyperparameter that moves, and the precisions that do not.

    Args:
        low: lower ends by name, shaped as the values; δ as (length of the prior,).
        high: upper ends likewise.
        unused: precisions of parameters without effect, (length of the prior,). They stay.
        blind: precisions of other parameters without curvature, likewise. They stay.
        settled: precisions that have nothing to gain where they are. They stay.
        held: precisions that are not to be tuned. They stay.
        dimensions: what counts directions, where an evidence is what is maximised: only of it is
            known what there is to gain.
    """

    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    unused: Tensor
    blind: Tensor
    settled: Tensor
    held: Tensor
    dimensions: CountsDimensions | None

    @property
    def of_evidence(self) -> bool:
        """Whether an evidence is what is maximised."""
        return self.dimensions is not None

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        objective: Objective,
        free: tuple[str, ...],
        start: Hyperparameters | None = None,
        held: Tensor | None = None,
    ) -> "Bounds":
        """Bounds around a start, and beyond where the posterior sits at an end that is none.

        Args:
            posterior: at today's hyperparameters, δ of every precision.
            objective: what is maximised.
            free: names of the hyperparameters that move.
            start: where tuning began; the posterior's hyperparameters by default.
            held: mask (length of the prior,) of precisions that are not to be tuned; none by
                default.
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
        unused, counts = posterior.unused_precisions, dimensions_of(objective)
        none = torch.zeros_like(unused)
        blind = none if counts is None else (counts.curvature(posterior) == 0) & ~unused
        held = none if held is None else held & ~unused
        bounds = cls(low, high, unused, blind & ~held, none, held, counts)
        return bounds.moved_on(posterior, LITTLE) or bounds

    @property
    def stays(self) -> Tensor:
        """The precisions that do not move."""
        return self.fixed | self.settled

    @property
    def fixed(self) -> Tensor:
        """Those that no search moves, whatever there is to gain."""
        return self.unused | self.blind | self.held

    def begun(self, posterior: Posterior, tolerance: float) -> tuple[Posterior, "Bounds"]:
        """The posterior with those precisions in their places of which these are known.

        The evidence rises without end in the precision of parameters at their prior mean: to the
        upper end with it, which moves on until no more than the tolerance is left to gain. What has
        no more to gain where it is stays there.

        Args:
            posterior: at the start.
            tolerance: of the search, in nats per unit of log δ.
        """
        if not self.of_evidence or "prior_precision" not in self.high:
            return posterior, self
        with torch.no_grad():
            equal = (posterior.squares == 0) & ~self.fixed
            # Searches end where slopes are below ten tolerances.
            flat = torch.where(equal, self._flat(posterior, 10 * tolerance), False)
            flat |= self._flat(posterior, tolerance) & ~self.fixed
            raised, high = equal & ~flat, self.high["prior_precision"].clone()
            bounds = replace(self, settled=flat | raised)
            while True:
                hyper = posterior.hyperparameters.detached()
                delta = torch.where(raised, high, hyper.prior_precision)
                moved = posterior.at(replace(hyper, prior_precision=delta))
                short = raised & ~self._flat(moved, 10 * tolerance)
                short &= high < FARTHEST["prior_precision"]
                if not bool(short.any()):
                    highs = {**self.high, "prior_precision": high}
                    return moved, replace(bounds, high=highs)
                high = torch.where(short, high * REACH, high)

    def moved_on(self, posterior: Posterior, little: float) -> "Bounds | None":
        """Bounds with those ends moved on, and those precisions released, that have more to gain.

        Args:
            posterior: where a search ended.
            little: half of γ and of δ‖θ − μ‖² below which there is nothing to gain, in nats.

        Returns:
            Other bounds, or None where these will do.
        """
        if not self.of_evidence:
            return None
        low, high, changed = dict(self.low), dict(self.high), False
        settled = self.settled
        with torch.no_grad():
            if "prior_precision" in high:
                # Twice and more what they were settled at: what the other precisions have changed.
                settled = self.settled & self._flat(posterior, max(LITTLE, 20 * little))
                changed = bool((settled != self.settled).any())
            for name, below, above in self.ends(posterior.hyperparameters):
                if name == "prior_precision":
                    more = ~self._flat(posterior, little) & ~self.stays
                    below, above = below & more, above & more
                elif name == "sigma_noise":
                    below = below & (not no_residuals(posterior))
                far = FARTHEST.get(name, 1e280)
                below, above = below & (low[name] > 1 / far), above & (high[name] < far)
                low[name] = torch.where(below, low[name] / REACH, low[name])
                high[name] = torch.where(above, high[name] * REACH, high[name])
                changed |= bool((below | above).any())
        return replace(self, low=low, high=high, settled=settled) if changed else None

    def without_gain(self, posterior: Posterior) -> Tensor:
        """Precisions that have next to nothing to gain: settled, at an end, of rounding alone."""
        found = self.settled | self._of_rounding(posterior)
        for name, below, above in self.ends(posterior.hyperparameters):
            if name == "prior_precision":
                found = found | below | above
        return found & self._flat(posterior, LITTLE) & ~self.fixed

    def gamma(self, posterior: Posterior) -> Tensor:
        """γ under what is maximised, (length of the prior,)."""
        assert self.dimensions is not None
        with torch.no_grad():
            return self.dimensions.effective_dimensions(posterior)

    def _flat(self, posterior: Posterior, little: float) -> Tensor:
        """Precisions with next to nothing to gain, (length of the prior,)."""
        delta = posterior.prior.full(posterior.hyperparameters.prior_precision.detach())
        with torch.no_grad():
            pull = delta * posterior.squares
            return 0.5 * torch.maximum(self.gamma(posterior), pull) <= little

    def _of_rounding(self, posterior: Posterior) -> Tensor:
        """Precisions of parameters whose curvature may be rounding alone."""
        assert self.dimensions is not None
        by_entry = self.dimensions.curvature(posterior) / posterior.prior.counts
        return by_entry <= NO_CURVATURE * by_entry.max()

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


def no_residuals(posterior: Posterior) -> bool:
    """Whether a Gaussian noise has nothing to explain, so that the evidence rises as it falls."""
    ggn = posterior.ggn
    if not ggn.likelihood.has_gaussian_noise:
        return True  # not known: the range is an end
    left, spread = float(ggn.statistic) / ggn.n_outputs, ggn.likelihood.target_spread(ggn.targets)
    return left <= (NO_RESIDUALS * spread) ** 2 if spread > 0 else left == 0
