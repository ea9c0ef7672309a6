"""What is updated together: the matrices of a layer by factors, any other parameter on its own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.optim.rules.rule import State, Update


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that share one state of a rule.

    Args:
        name: of the first of them.
        params: by name, in the order of the layout.
        layout: how they lie in matrices (b, o, i); None for a parameter without factors.
    """

    name: str
    params: Mapping[str, Tensor]
    layout: Layout | None = None

    @property
    def key(self) -> Tensor:
        """The parameter under which the optimiser keeps the state."""
        return self.params[self.name]

    @property
    def like(self) -> Tensor:
        """A tensor of the matrices' shape, dtype and device, of no memory."""
        assert self.layout is not None
        one = accumulable(self.key.detach().new_zeros(()))
        return one.expand(self.layout.matrix)

    def gradient(self) -> Tensor | None:
        """The gradient by the matrices, or by the parameter, at least float32; None without any.

        Parameters without a gradient have a zero one beside those that have.
        """
        if all(p.grad is None for p in self.params.values()):
            return None
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.params.items()
        }
        one = found[self.name] if self.layout is None else self.layout.pack(found)
        return accumulable(one)

    def steps(self, update: Update) -> dict[str, Update]:
        """The update of each parameter that has a gradient, in its own dtype."""
        parts = update.parts(self._parts)
        return {name: parts[name] for name, p in self.params.items() if p.grad is not None}

    def _parts(self, whole: Tensor) -> dict[str, Tensor]:
        """The entries of each parameter."""
        parts = {self.name: whole} if self.layout is None else self.layout.unpack(whole)
        # Those of complex parameters are pairs of real numbers.
        return {name: parts[name].to(p.dtype.to_real()) for name, p in self.params.items()}

    def joined(self, states: Mapping[str, State]) -> State | None:
        """One state of those that the parameters had on their own; None where some had none."""
        if self.layout is None or any(name not in states for name in self.params):
            return None
        first = states[self.name]
        return {
            key: value
            if not isinstance(value, Tensor)
            else self.layout.pack({name: _tensor(states[name], key) for name in self.params})
            for key, value in first.items()
        }


def _tensor(state: State, key: str) -> Tensor:
    value = state[key]
    assert isinstance(value, Tensor)
    return value


def single(named: Mapping[str, Tensor]) -> list[Unit]:
    """Each parameter on its own."""
    return [Unit(name, {name: p}) for name, p in named.items()]


def units_of(named: Mapping[str, Tensor], groups: Iterable[Group]) -> list[Unit]:
    """Units of the groups with factors, then of all other parameters.

    Args:
        named: the parameters of the optimiser.
        groups: groups with factors.
    """
    units = [
        Unit(group.name, {name: named[name] for name in group.layout.params}, group.layout)
        for group in groups
        if all(name in named for name in group.layout.params)
    ]
    taken = {name for unit in units for name in unit.params}
    return units + single({name: p for name, p in named.items() if name not in taken})


def check_gradients(params: Sequence[Any]) -> None:
    """Raise `RuntimeError` for sparse gradients, as torch's Adam does."""
    if any(p.grad is not None and p.grad.is_sparse for p in params):
        raise RuntimeError("KFAC does not support sparse gradients: set sparse=False")
