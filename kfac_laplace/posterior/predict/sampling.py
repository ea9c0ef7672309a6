"""Outputs at sampled weights: linearised by forward-mode products, or through the network."""

from collections.abc import Iterator, Mapping

import torch
from torch import Generator, Tensor
from torch.func import jvp

from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.posterior.gaussian import Posterior

#: Weight samples are drawn so many at a time.
SAMPLES_AT_ONCE = 16


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
    """
    network, mode = posterior.curvature.network, posterior.mode_for_model

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return network.forward(batch.x, params)

    with undisturbed(network.model), torch.no_grad():
        samples = []
        for deviation in _deviations(posterior, mode, n, generator):
            tangents = {name: scale * value for name, value in deviation.items()}
            f, change = jvp(outputs, (mode,), (tangents,))  # type: ignore[misc]  # two without aux
            samples.append(f + change)
    return torch.stack(samples)


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
    """
    network, mode = posterior.curvature.network, posterior.mode_for_model
    with undisturbed(network.model), torch.no_grad():
        samples = []
        for deviation in _deviations(posterior, mode, n, generator):
            weights = {name: mode[name] + scale * value for name, value in deviation.items()}
            samples.append(network.forward(batch.x, weights))
    return torch.stack(samples)


def _deviations(
    posterior: Posterior, mode: Mapping[str, Tensor], n: int, generator: Generator
) -> Iterator[dict[str, Tensor]]:
    """θ_s − θ* in the model's precision, one sample after another."""
    for start in range(0, n, SAMPLES_AT_ONCE):
        drawn = posterior.deviations(min(SAMPLES_AT_ONCE, n - start), generator)
        for s in range(len(next(iter(drawn.values())))):
            yield {name: value[s].to(mode[name].dtype) for name, value in drawn.items()}
