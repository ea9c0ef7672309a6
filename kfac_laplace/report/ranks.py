"""Figures by ranks, with weights: telling strange inputs, and knowing when one is wrong."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Share of the usual inputs that the threshold of FPR95 lets pass.
PASSED = 0.95


@dataclass(frozen=True)
class Told:
    """A score of usual and of strange inputs, larger for stranger ones.

    Args:
        usual: shape (n,).
        strange: shape (m,).
    """

    usual: Tensor
    strange: Tensor

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both in ascending order, which of them are strange, and the last of each tie."""
        scores, order = torch.cat([self.usual, self.strange]).sort()
        return order, order >= len(self.usual), last_of_ties(scores)

    def figures(self, usual: Tensor, strange: Tensor) -> dict[str, Tensor]:
        """AUROC and FPR95, (b,) each.

        AUROC is the chance that a strange input scores above a usual one, where ties count half.
        FPR95 is the share of the strange ones that pass with the usual ones under the lowest
        threshold at which 95 % of the usual ones do.

        Args:
            usual: weights (b, n).
            strange: weights (b, m).
        """
        order, is_strange, ends = self._order
        weights = torch.cat([usual, strange], 1)[:, order]
        below = (weights * ~is_strange).cumsum(1)[:, ends]  # usual ones up to here
        passed = (weights * is_strange).cumsum(1)[:, ends]
        total, others = below[:, -1], passed[:, -1]
        between = below - 0.5 * below.diff(dim=1, prepend=below.new_zeros(len(below), 1))
        area = (between * passed.diff(dim=1, prepend=passed.new_zeros(len(passed), 1))).sum(1)
        # Sums of whole numbers are exact; the product with 0.95 is not.
        first = (below < (PASSED * total)[:, None] * (1 - 1e-12)).sum(1)
        rate = passed.gather(1, first[:, None])[:, 0] / others
        return {"auroc": area / (total * others), "fpr95": rate}


def risk_over_coverage(confidence: Tensor, wrong: Tensor, weights: Tensor) -> Tensor:
    """AURC: the error rate of those at least as sure as a row, averaged over the rows, (b,).

    Rows that are equally sure are answered together or not at all.

    Args:
        confidence: shape (rows,).
        wrong: 1 or 0, (rows,).
        weights: shape (b, rows).
    """
    sure, order = (-confidence).sort()
    ends = last_of_ties(sure)
    weights = weights[:, order]
    answered = weights.cumsum(1)[:, ends]
    errors = (weights * wrong[order]).cumsum(1)[:, ends]
    own = answered.diff(dim=1, prepend=answered.new_zeros(len(answered), 1))
    risk = torch.where(answered > 0, errors / answered, 0.0)
    return (own * risk).sum(1) / answered[:, -1]


def last_of_ties(ordered: Tensor) -> Tensor:
    """Places (k,) of the last of each run of equal values."""
    return torch.cat([ordered.diff() != 0, ordered.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
