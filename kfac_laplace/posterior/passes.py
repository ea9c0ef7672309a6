"""The model run at a posterior's mode, batch by batch."""

from typing import Any

from torch import Tensor

from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.probing import learn_row_layouts
from kfac_laplace.curvature.model.batches import AnyBatch, check_rows
from kfac_laplace.posterior.gaussian import Posterior


def recorded(posterior: Posterior, batch: AnyBatch) -> ForwardPass:
    """A pass at the mode, with the layouts of its rows known.

    Args:
        posterior: the posterior; the model runs at its mode, whatever its weights are now.
        batch: the inputs.
    """
    passed = posterior.network.record(batch, posterior.ggn.knowledge, posterior.mode_for_model)
    check_rows(passed.recording.output, batch)
    return passed.knowing(learn_row_layouts(passed))


def counted(posterior: Posterior, x: Any, y: Tensor) -> AnyBatch:
    """Inputs as examples, as many as there are targets."""
    n = len(y) if y.ndim else None
    return posterior.network.batch(x, n, posterior.ggn.knowledge.interface)
