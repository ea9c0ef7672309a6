"""How many numbers an optimiser keeps for a matrix, as a function of its shape."""

from dataclasses import dataclass

from kfac_laplace.optim.rules.rule import Rule


@dataclass(frozen=True)
class Numbers:
    """Numbers kept for one group of b matrices (o, i).

    Args:
        moments: 2·b·o·i for Adam's rules, b·o·i for `Damped` without grafting.
        bases: b·(o² + o + i² + i), a side that stays in its own coordinates d in place of d² + d.
        factors: b·(o² + i²), packed b·(o(o + 1) + i(i + 1))/2, diagonal b·d for such a side.
        parameters: b·o·i.
    """

    moments: int
    bases: int
    factors: int
    parameters: int

    @property
    def per_parameter(self) -> float:
        """All of them for each parameter. AdamW keeps 2."""
        return (self.moments + self.bases + self.factors) / self.parameters


def numbers_of_state(
    shape: tuple[int, int, int], rule: Rule, *, largest: int, packed: bool = True
) -> Numbers:
    """What a rule, bases and factors keep for matrices (b, o, i)."""
    raise NotImplementedError
