"""Damping by prior precisions: what the prior adds to the curvature of a tuner's loss."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kfac_laplace.errors import InvalidValue
from kfac_laplace.optim.rules import Damped, Rule


class TellsDamping(Protocol):
    """What knows λ of each parameter by name: `MarglikTuner`."""

    def damping(self) -> Mapping[str, float]:
        """λ by parameter name, in units of the curvature of the mean loss at σ = T = 1."""
        ...


@dataclass(frozen=True)
class PriorDamping:
    """λ of every parameter, from a tuner and where it has none from the rule.

    Args:
        source: the tuner.
        otherwise: λ of the rule.
    """

    source: TellsDamping
    otherwise: float

    @classmethod
    def of(cls, source: TellsDamping, rule: Rule) -> "PriorDamping":
        """That of a rule with damping.

        Raises:
            InvalidValue: a rule without.
        """
        if not isinstance(rule, Damped):
            raise InvalidValue(
                "the rule has no damping",
                where="damped_by",
                got=type(rule).__name__,
                remedy="Make the optimiser with rule=Damped()",
            )
        return cls(source, rule.known_damping.strength)

    def by_name(self, names: Iterable[str]) -> dict[str, float]:
        """λ of parameters as it is now."""
        found = self.source.damping()
        return {name: found.get(name, self.otherwise) for name in names}
