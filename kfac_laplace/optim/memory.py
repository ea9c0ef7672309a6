"""How many numbers an optimiser keeps for a matrix, as a function of its shape."""

from dataclasses import dataclass

import torch

from kfac_laplace.optim.rules.rule import Rule


@dataclass(frozen=True)
class Numbers:
    """Numbers kept for one group of b matrices (o, i).

    A side wider than `largest` keeps d numbers where others keep d² + d or d²; but its B is kept
    whole, as the curvature of the averages takes it.

    Args:
        parameters: b·o·i.
        moments: 2·b·o·i for Adam's rules, b·o·i for `Damped` without grafting.
        bases: b·(o² + o + i² + i).
        factors: b·(o² + i²), or packed b·(o(o + 1) + i(i + 1))/2; fewer as long as rows are.
    """

    parameters: int
    moments: int
    bases: int
    factors: int

    def __add__(self, other: "Numbers") -> "Numbers":
        """Those of both."""
        return Numbers(
            self.parameters + other.parameters,
            self.moments + other.moments,
            self.bases + other.bases,
            self.factors + other.factors,
        )

    @property
    def per_parameter(self) -> float:
        """All that is kept, for each parameter. AdamW keeps 2."""
        return (self.moments + self.bases + self.factors) / self.parameters


def numbers_of_state(
    shape: tuple[int, int, int], rule: Rule, *, largest: int, packed: bool = True
) -> Numbers:
    """What a rule, bases and factors keep for matrices (b, o, i) while nothing is being computed.

    Small groups of one shape keep their eigenvectors a second time (`bases.STACKED_ENTRIES`).

    Args:
        shape: (b, o, i), the bias a column.
        rule: it says how many moments.
        largest: a side wider than this stays in its own coordinates.
        packed: whether factors are stored as half of a square.
    """
    b, *widths = shape
    parameters = b * widths[0] * widths[1]
    moments = rule.init(torch.empty(shape, device="meta"))
    bases = factors = 0
    for side, d in enumerate(widths):
        dense = 1 < d <= largest
        bases += d * d + d if dense else d
        whole = dense or side == 0
        factors += (d * (d + 1) // 2 if packed else d * d) if whole else d
    kept = [one for one in moments.values() if isinstance(one, torch.Tensor)]
    return Numbers(parameters, parameters * len(kept), b * bases, b * factors)
