"""Outputs at sampled weights: linearised by forward-mode products, or through the network."""

from collections.abc import Iterator, Mapping

import torch
from torch import Generator, Tensor
from torch.func import jvp

from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.finite import SAMPLES, finite

#: Weight samples are drawn so many together, block by block. No budget: it says which random
#: number is whose.
DRAWN_TOGETHER = 16


def linearised_samples(
    posterior: Posterior, batch: AnyBatch, n: int, scale: float, generator: Generator
) -> Tensor:
    """f_θ*(x) + J (θ_s − θ*), joint across inputs, shape (n, *output shape).

    Args:
        posterior: the posterior.
        batch: the inputs.
        n: number of samples.
        scale: factor on the deviations, √κ.
        generator: source of the weight samples.

    Raises:
        InvalidValue: outputs that are not finite.
    """
    network, mode = posterior.network, posterior.mode_for_model

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return network.output(batch, posterior.ggn.knowledge, params)

    with undisturbed(network.model), torch.no_grad():
        samples = []
        for deviation in _deviations(posterior, mode, n, generator):
            tangents = {name: scale * value for name, value in deviation.items()}
            f, change = jvp(outputs, (mode,), (tangents,))  # type: ignore[misc]  # two without aux
            samples.append(f + change)
    return finite(torch.stack(samples), "outputs at sampled weights", SAMPLES)


def network_samples(
    posterior: Posterior, batch: AnyBatch, n: int, scale: float, generator: Generator
) -> Tensor:
    """f_θs(x) through the network with sampled weights, shape (n, *output shape).

    The weights go in by a functional call: the model itself is never written to.

    Args:
        posterior: the posterior.
        batch: the inputs.
        n: number of samples.
        scale: factor on the deviations, √κ.
        generator: source of the weight samples.

    Raises:
        InvalidValue: outputs that are not finite.
    """
    network, mode = posterior.network, posterior.mode_for_model
    with undisturbed(network.model), torch.no_grad():
        samples = []
        for deviation in _deviations(posterior, mode, n, generator):
            weights = {name: mode[name] + scale * value for name, value in deviation.items()}
            samples.append(network.output(batch, posterior.ggn.knowledge, weights))
    return finite(torch.stack(samples), "outputs at sampled weights", SAMPLES)


def _deviations(
    posterior: Posterior, mode: Mapping[str, Tensor], n: int, generator: Generator
) -> Iterator[dict[str, Tensor]]:
    """θ_s − θ* in the model's precision, one sample after another.

    Where the budget has no room for all that are drawn together, they are drawn again for each
    part of them.
    """
    size = sum(value.numel() for value in mode.values())
    room = posterior.network.budget.samples(size, DRAWN_TOGETHER)
    for start in range(0, n, DRAWN_TOGETHER):
        count, state = min(DRAWN_TOGETHER, n - start), generator.get_state()
        for first in range(0, count, room):
            generator.set_state(state)
            drawn = posterior.deviations(count, generator, slice(first, first + room))
            for s in range(min(room, count - first)):
                yield {name: value[s].to(mode[name].dtype) for name, value in drawn.items()}
