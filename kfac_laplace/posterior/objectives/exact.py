"""The evidence by the exact Gauss-Newton curvature of all parameters together."""

from dataclasses import dataclass

from kfac_laplace.curvature.estimate.fisher import Exact
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.dual import DualEvidence
from kfac_laplace.posterior.objectives.forms import MAX_PARAMETERS, log_det_of
from kfac_laplace.posterior.objectives.points import Looked, chosen_points
from kfac_laplace.posterior.objectives.registry import NAMED, Data

#: Output columns of the data, at most: N·(C − 1) of them for softmax.
MAX_ROWS = 2048


@dataclass(frozen=True)
class ExactGGN:
    """log det(I + s Σ K_l/δ_l) over all output columns, N·(C−1) of softmax and N·C of others."""

    #: Of what it becomes γ is known.
    evidence = True

    def on(self, posterior: Posterior, data: Data) -> DualEvidence:
        """By one pass over the data, and a backward pass for each output.

        Args:
            posterior: at its mode.
            data: its training data.

        Raises:
            InvalidValue: more than 2,048 rows and more than 2,048 parameters.
        """
        rows = rows_in(posterior)
        if min(rows, posterior.prior.size) > max(MAX_ROWS, MAX_PARAMETERS):
            raise InvalidValue(
                f"the data have {rows} output columns, and 'exact' takes at most {MAX_ROWS}",
                where="objective",
                got=f"'exact' with {int(posterior.ggn.n_data)} examples and "
                f"{posterior.prior.size} parameters",
                remedy="Use objective='columns', which takes random columns of each example",
            )
        looked = Looked(posterior, Exact())
        part = log_det_of(looked, chosen_points(posterior, data), rows)
        return DualEvidence("exact", part)


def rows_in(posterior: Posterior) -> int:
    """How many output columns the data have: C − 1 of softmax rows, C of others."""
    ggn = posterior.ggn
    return round(ggn.likelihood.determined(ggn.targets, ggn.n_outputs))


NAMED["exact"] = ExactGGN()
