"""Inputs of a prediction as examples, without targets that would count them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kfac_laplace.curvature.model.batches import AnyBatch, Batch, BatchFn
from kfac_laplace.curvature.model.graphs import is_graph
from kfac_laplace.curvature.model.mappings import without
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.errors import InvalidType
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


def inputs_alone(raw: Any, batch_fn: BatchFn | None, where: str) -> Any:
    """Inputs of a batch whose targets do not matter: there may be none.

    Args:
        raw: what a loader yielded: inputs, a pair with targets, a mapping, or graphs.
        batch_fn: takes a batch to (x, y), where none of these forms fits.
        where: the loader's name, for the error.

    Raises:
        InvalidType: a sequence of which nothing says what the model takes.
    """
    if batch_fn is not None:
        return batch_fn(raw)[0]
    # Graph batches may be sequences as well.
    if not isinstance(raw, Sequence) or isinstance(raw, str) or is_graph(raw):
        return raw
    if len(raw) not in (1, 2):  # which of them the model takes, nothing says
        raise InvalidType(
            "a batch is inputs alone, a pair (x, y), a mapping, or graphs",
            where=where,
            got=f"{type(raw).__name__} of {len(raw)}",
            remedy="Yield pairs (x, y), or pass batch_fn to Laplace",
        )
    return raw[0]
