"""The evidence between two bounds: a partition of the data above, random columns below.

log det(I + K) ≤ Σ_b log det(I + K_bb) over blocks of rows (Fischer), and by concavity it is at
least the expectation of that of random columns [NTK23].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.fisher import Exact
from kfac_laplace.options import check_whole
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.log_dets import Sum
from kfac_laplace.posterior.objectives.columns import Columns
from kfac_laplace.posterior.objectives.dual import DualEvidence
from kfac_laplace.posterior.objectives.forms import MAX_GRAMS, log_det_of
from kfac_laplace.posterior.objectives.points import Looked, Points, chosen_points, count_of
from kfac_laplace.posterior.objectives.registry import NAMED, Data

#: Labels of a batch by which it is divided, at most: each of them costs a pass.
MAX_LABELS = 32


@dataclass(frozen=True)
class Bracket:
    """The mean of both bounds; `Evidence` has them on their own.

    Blocks hold examples of one label where labels are classes, which is tighter. Where their Gram
    matrices would be too many, a random part of the data stands for all: the upper bound then holds
    in expectation.

    Args:
        rows: M, output columns of a block, and of the lower bound, at the most.
        each: random columns of an example, of the lower bound.
    """

    rows: int = 512
    each: int = 1

    #: Of what it becomes γ is known.
    evidence = True

    def __post_init__(self) -> None:
        """Check both numbers."""
        check_whole("each", self.each, 1)
        check_whole("rows", self.rows, self.each)

    def on(self, posterior: Posterior, data: Data) -> DualEvidence:
        """By two passes over the data, the first with a backward pass for each output.

        Args:
            posterior: at its mode.
            data: its training data.
        """
        upper = self._partition(posterior, data)
        lower = Columns(self.each, self.rows).on(posterior, data).part
        mean = Sum([(0.5, 1.0, lower), (0.5, 1.0, upper)])
        return DualEvidence("bounds", mean, (lower, upper))

    def _partition(self, posterior: Posterior, data: Data) -> Sum:
        """Σ_b log det(I + s Σ K_l,bb/δ_l)."""
        looked, n_data = Looked(posterior, Exact()), int(posterior.ggn.n_data)
        count = max(1, min(n_data, MAX_GRAMS // (self.rows * looked.each * posterior.prior.length)))
        size = max(1, self.rows // looked.each)
        points = chosen_points(posterior, data, count)
        pieces = [piece for each in points for piece in _divided(each, size)]
        weight = n_data / count_of(points)
        terms = []
        for block in _blocks(pieces, size):
            part = log_det_of(looked, block, looked.each * count_of(block))
            terms.append((weight, 1.0, part))
        return Sum(terms)


def _divided(points: Points, size: int) -> Iterator[Points]:
    """Points of one label each, where labels are classes; at most `size` at a time."""
    y = points.y
    labelled = len(y) == points.batch.n and y.ndim == 1 and not y.is_floating_point()
    labels = y.unique().tolist() if labelled else []
    if not 1 < len(labels) <= MAX_LABELS:
        yield from points.pieces(size)
        return
    for label in labels:
        index = (y == label).nonzero()[:, 0]
        yield from Points(points.batch.select(index), y[index], points.seed).pieces(size)


def _blocks(pieces: Sequence[Points], size: int) -> Iterator[list[Points]]:
    """Pieces by label, as many together as there is room for."""
    block: list[Points] = []
    for piece in sorted(pieces, key=lambda each: _label(each.y)):
        if block and count_of(block) + piece.batch.n > size:
            yield block
            block = []
        block.append(piece)
    if block:
        yield block


def _label(y: Tensor) -> float:
    """Whereby pieces are put in order."""
    return float(y.flatten()[0]) if y.numel() and y.dtype != torch.bool else 0.0


NAMED["bounds"] = Bracket()
