"""Hyperparameters when the posterior has other parameters or groups than before: by name."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.prior import Prior


@dataclass(frozen=True)
class Carry:
    """Which precisions of one prior go on in another: those of parameters that both have.

    Args:
        before: places in the earlier vector of precisions, shape (k,).
        after: for each the place in the later one, shape (k,).
        length: number of the later precisions.
    """

    before: Tensor
    after: Tensor
    length: int

    @classmethod
    def between(cls, before: Prior, after: Prior) -> "Carry":
        """The places that the entries of parameters of one name and shape have in two priors."""
        old, new = _places(before), _places(after)
        pairs = [
            torch.stack([place.flatten() for place in torch.broadcast_tensors(old[name], place)])
            for name, place in new.items()
            if name in old and before.layouts.shapes[name] == after.layouts.shapes[name]
        ]
        none = torch.zeros(2, 0, dtype=torch.int64, device=after.device)
        found = torch.cat([none, *(pair.to(after.device) for pair in pairs)], 1).unique(dim=1)
        found = found[:, (found >= 0).all(0)]
        return cls(found[0], found[1], after.length)

    @property
    def known(self) -> Tensor:
        """Mask (length,) of the later precisions that go on from earlier ones."""
        known = torch.zeros(self.length, dtype=torch.bool, device=self.after.device)
        known[self.after] = True
        return known

    def values(self, earlier: Tensor) -> Tensor:
        """Means (length,) of the earlier values that end at each place; 0 where there are none."""
        low, high = (self._reduced(earlier, extreme) for extreme in ("amin", "amax"))
        mean = self._reduced(earlier, "mean")
        return torch.where(low == high, low, mean)  # one value stays as it is, to its last digit

    def _reduced(self, earlier: Tensor, how: str) -> Tensor:
        picked = earlier.to(self.after.device)[self.before]
        empty = picked.new_zeros(self.length)
        return empty.scatter_reduce(0, self.after, picked, how, include_self=False)

    def precision(self, earlier: Tensor, start: Tensor | None) -> Tensor:
        """The later precisions: geometric means of the earlier ones, `start` for what is new."""
        low, high = (self._reduced(earlier, extreme) for extreme in ("amin", "amax"))
        mean = self.values(earlier.log()).exp()
        carried = torch.where(low == high, low, mean)
        return carried if start is None else torch.where(self.known, carried, start)

    def moments(self, adam: Mapping[str, Any] | None, leaf: int) -> dict[str, Any] | None:
        """Adam's state with the moments of the precisions at their new places.

        Where some are new, Adam starts anew for all of them: it counts the steps of all its entries
        together, and a new one among old ones would jump.

        Args:
            adam: its `state_dict`, or None.
            leaf: number of the precisions among its tensors.
        """
        if adam is None:
            return None
        adam = copy.deepcopy(dict(adam))
        own = adam["state"].pop(leaf, None)
        if own is not None and bool(self.known.all()):
            moved = {name: self.values(own[name]) for name in ("exp_avg", "exp_avg_sq")}
            adam["state"][leaf] = {**own, **moved}
        return adam


def carried(
    hyper: Hyperparameters,
    before: Prior,
    after: Prior,
    initial: Tensor | Mapping[str, float],
) -> tuple[Hyperparameters, Carry]:
    """Hyperparameters of a prior over other parameters, and how they came from the earlier ones.

    Args:
        hyper: today's, of the earlier prior.
        before: that prior.
        after: the later one.
        initial: δ at which new precisions start: one number, or {pattern: number}.

    Raises:
        InvalidValue: there are new precisions, and what they start at was not said.
    """
    carry, start = Carry.between(before, after), None
    if not bool(carry.known.all()):
        try:
            start = after.resolve(initial).to(after.device)
        except InvalidValue as error:
            new = [name for name in after.layouts.params if name not in before.layouts.shapes]
            raise InvalidValue(
                "parameters are trained now for which prior_precision has no value",
                where=", ".join(new) or "model",
                got=str(error),
                remedy="Give prior_precision as one number or by patterns of names, or freeze them",
            ) from error
    precision = carry.precision(before.full(hyper.prior_precision), start)
    return replace(hyper, prior_precision=precision), carry


def _places(prior: Prior) -> dict[str, Tensor]:
    """For each parameter the places of its precisions: one, or one for each entry.

    Entries outside a subnetwork have none: −1.
    """
    groups = prior.layouts.groups.items()
    if prior.constant_on_blocks:
        return {param: prior.index[name] for name, la in groups for param in la.params}
    spread = {name: prior.index[name].expand(la.matrix) for name, la in groups}
    return {p: v - 1 for name, la in groups for p, v in la.unpack(spread[name] + 1).items()}
