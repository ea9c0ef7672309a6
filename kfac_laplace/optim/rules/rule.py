"""What all rules share: the form of their state and of their answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kfac_laplace.optim.bases import Eigenbases

#: What a rule keeps of one group: tensors (b, o, i) and the number of its steps, "step". Tensors
#: are updated in place, numbers replaced. A state stored and read again goes on bit by bit.
State = dict[str, Tensor | int]


@dataclass(frozen=True)
class Update:
    """A step of one group, W ← W − (lr / divisor) · numerator / denominator, entry by entry.

    A quotient in place of its value, as torch's optimisers round it: so they can be met bit by bit.

    Args:
        numerator: shape (b, o, i). Not to be changed: it may be the rule's own moment.
        denominator: the same shape, or None for ones.
        divisor: a number that the learning rate is divided by.
    """

    numerator: Tensor
    denominator: Tensor | None = None
    divisor: float = 1.0

    def of(self, part: Callable[[Tensor], Tensor]) -> "Update":
        """That of one parameter: `part` takes its entries from matrices (b, o, i)."""
        denominator = None if self.denominator is None else part(self.denominator)
        return Update(part(self.numerator), denominator, self.divisor)

    def parts(self, split: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, "Update"]:
        """Those of parameters: `split` takes their entries by name from matrices (b, o, i)."""
        numerators = split(self.numerator)
        if self.denominator is None:
            return {name: Update(one, None, self.divisor) for name, one in numerators.items()}
        denominators = split(self.denominator)
        return {
            name: Update(one, denominators[name], self.divisor) for name, one in numerators.items()
        }

    def matrices(self) -> Tensor:
        """U of W ← W − lr · U as a tensor of its own, shape (b, o, i)."""
        update = self.numerator / self.divisor
        return update if self.denominator is None else update / self.denominator


@dataclass(frozen=True)
class Direction:
    """The update of one group before its length is known.

    Args:
        update: the step at length one.
        inner: ⟨U, m̂⟩ over the whole group, shape (), where the length asks for it.
        norm: the Frobenius norm over the whole group that the update shall have, shape (); None for
            its own.
    """

    update: Update
    inner: Tensor | None = None
    norm: Tensor | None = None


class Rule(Protocol):
    """How gradients become updates. Implementations are frozen dataclasses of plain numbers."""

    def init(self, gradient: Tensor) -> State:
        """The state of a group before its first step.

        Args:
            gradient: a tensor of the shape (b, o, i), dtype and device of the group's gradient.
        """
        ...

    def directions(
        self,
        gradients: Sequence[Tensor],
        states: Sequence[State],
        bases: Eigenbases,
        dampings: Sequence[float | Tensor] | None = None,
    ) -> list[Direction]:
        """Count a step in every state and turn gradients into directions. First phase of a step.

        Args:
            gradients: of the mean loss by the matrices of each group, (b, o, i), in the dtype of
                the bases. Not changed.
            states: of the same groups; updated in place.
            bases: of the same groups.
            dampings: for each group λ, in units of the curvature of the mean loss, in place of the
                rule's own; rules without damping ignore it.
        """
        ...

    def lengths(
        self, directions: Sequence[Direction], lrs: Sequence[float | Tensor]
    ) -> list[Update]:
        """Give the directions of all groups their lengths. Second phase of a step.

        Args:
            directions: of all groups that make a step together.
            lrs: the learning rate of each of these groups.
        """
        ...

    def turn(self, states: Sequence[State], before: Eigenbases, after: Eigenbases) -> None:
        """Take moments from the bases they were made in to new ones. Call it when bases change.

        Args:
            states: of some groups; updated in place.
            before: their bases so far.
            after: their bases from now on.
        """
        ...
