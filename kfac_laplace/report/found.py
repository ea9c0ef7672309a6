"""What one way of predicting found on all data."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kfac_laplace.report.means import ClassRows, ValueRows
from kfac_laplace.report.ranks import Told
from kfac_laplace.report.ways import Way


@dataclass
class Found:
    """Rows of test data, and scores of how strange inputs are.

    Args:
        way: the way.
        rows: what its predictions are worth.
        usual: scores of test data by name, (n,) each.
        strange: those of strange inputs, (m,).
    """

    way: Way
    rows: ClassRows | ValueRows
    usual: dict[str, Tensor] | None = None
    strange: dict[str, Tensor] | None = None

    @cached_property
    def told(self) -> dict[str, Told]:
        """How strange inputs are told, by score; empty without any."""
        if self.usual is None or self.strange is None:
            return {}
        return {name: Told(self.usual[name], self.strange[name]) for name in self.way.scores}

    def figures(self, usual: Tensor, *strange: Tensor) -> dict[str, dict[str, Tensor]]:
        """Figures (b,) of test data under "", and of strange inputs under each score.

        Args:
            usual: weights of the examples (b, n).
            strange: those of strange inputs (b, m), where there are some.
        """
        told = {name: one.figures(usual, *strange) for name, one in self.told.items()}
        return {"": self.rows.figures(usual), **told}
