"""Inputs of a prediction as examples, without targets that would count them."""

from collections.abc import Mapping
from typing import Any

import torch

from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.curvature.model.mappings import without
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.posterior.gaussian import Posterior


def inputs_of(posterior: Posterior, x: Any, key_y: str) -> AnyBatch:
    """A batch of those inputs that ran over the examples in the fit.

    Where neither the fit nor their lengths tell how many examples there are, the output does.

    Args:
        posterior: the posterior.
        x: inputs.
        key_y: name of the targets, which a mapping may still hold.

    Raises:
        InvalidValue: no example, or an input with fewer axes than in the fit.
    """
    if isinstance(x, Mapping):
        x = without(x, key_y)
    network = posterior.network
    batch = network.batch(x, interface=posterior.ggn.knowledge.interface)
    if batch.certain or not isinstance(batch, Batch):
        return batch
    with undisturbed(network.model), torch.no_grad():
        output = network.forward(batch.copied().x, posterior.mode_for_model)
    return batch.of(output.shape[0] if output.ndim else 1)
