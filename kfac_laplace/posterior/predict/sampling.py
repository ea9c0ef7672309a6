"""Outputs at sampled weights: linearised by forward-mode products, or through the network.

Both come in at least float32: in half precision their squares overflow, and their mean is lost.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Generator, Tensor
from torch.func import jvp

from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.finite import SAMPLES, finite
from kfac_laplace.process import FORWARD_MODE, TURNS

#: Weight samples are drawn so many together, block by block. No budget: it says which random
#: number is whose.
DRAWN_TOGETHER = 16


def linearised_samples(
    posterior: Posterior,
    batch: AnyBatch,
    n: int,
    scale: float,
    generator: Generator,
    in_graph: bool = False,
) -> Tensor:
    """f_θ*(x) + J (θ_s − θ*), joint across inputs, shape (n, *output shape).

    Args:
        posterior: the posterior.
        batch: the inputs.
        n: number of samples.
        scale: factor on the deviations, √κ.
        generator: source of the weight samples.
        in_graph: whether the samples stay in the graph of the inputs; the draws of weights do not.

    Raises:
        InvalidValue: outputs that are not finite.
    """
    network, mode = posterior.network, posterior.mode_for_model
    with undisturbed(network.model), torch.set_grad_enabled(in_graph):
        samples = [
            _linearised(posterior, batch, mode, deviation, scale)
            for deviation in _deviations(posterior, n, generator)
        ]
    return finite(torch.stack(samples), "outputs at sampled weights", SAMPLES)


def _linearised(
    posterior: Posterior,
    batch: AnyBatch,
    mode: Mapping[str, Tensor],
    deviation: Mapping[str, Tensor],
    scale: float,
) -> Tensor:
    """f_θ*(x) + scale · J deviation."""
    unit = _unit(mode, deviation)
    tangents = {
        name: (scale / unit * _in_dtype(value, mode[name].dtype)).to(mode[name].dtype)
        for name, value in deviation.items()
    }
    network, known = posterior.network, posterior.ggn.knowledge

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return network.output(batch, known, params)

    try:
        with TURNS.of([FORWARD_MODE]):
            f, change = jvp(outputs, (dict(mode),), (tangents,))  # type: ignore[misc]  # no aux
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_FORWARD_MODE):
            raise
        raise UnsupportedUse(
            "a part of the model has no forward-mode derivative, which linearised samples take",
            where="pred_type",
            got=str(error).partition("\n")[0],
            remedy="Give its autograd function setup_context and jvp; or use pred_type='nn', or "
            "'glm' with link_approx='mc', which need none",
        ) from error
    f, change = accumulable(f), accumulable(change)
    return f + unit * change


#: What torch says of derivatives that are not there, or where a model writes into its buffers.
NO_FORWARD_MODE = (
    "autograd.Function",
    "forward AD",
    "forward mode AD",
    "forward-mode AD",
    "captured Tensor",
)


def _unit(mode: Mapping[str, Tensor], deviation: Mapping[str, Tensor]) -> float:
    """A power of two by which deviations are divided in float16, where changes may overflow.

    The largest is then between a half and one; 1 in any other precision.
    """
    if not any(value.dtype == torch.float16 for value in mode.values()):
        return 1.0
    sizes = (float(value.abs().max()) for value in deviation.values() if value.numel())
    return 2.0 ** math.frexp(max(sizes, default=1.0))[1]


def _in_dtype(deviation: Tensor, dtype: torch.dtype) -> Tensor:
    """A deviation in the model's precision, unless that ends too early."""
    return deviation if dtype == torch.float16 else deviation.to(dtype)


def network_samples(
    posterior: Posterior,
    batch: AnyBatch,
    n: int,
    scale: float,
    generator: Generator,
    in_graph: bool = False,
) -> Tensor:
    """f_θs(x) through the network with sampled weights, shape (n, *output shape).

    The weights go in by a functional call: the model itself is never written to.

    Args:
        posterior: the posterior.
        batch: the inputs.
        n: number of samples.
        scale: factor on the deviations, √κ.
        generator: source of the weight samples.
        in_graph: whether the samples stay in the graph of the inputs; the draws of weights do not.

    Raises:
        InvalidValue: outputs that are not finite.
    """
    network, mode = posterior.network, posterior.mode_for_model
    with undisturbed(network.model), torch.set_grad_enabled(in_graph):
        samples = []
        for deviation in _deviations(posterior, n, generator):
            weights = {
                name: mode[name] + scale * value.to(mode[name].dtype)
                for name, value in deviation.items()
            }
            samples.append(accumulable(network.output(batch, posterior.ggn.knowledge, weights)))
    return finite(torch.stack(samples), "outputs at sampled weights", SAMPLES)


def _deviations(posterior: Posterior, n: int, generator: Generator) -> Iterator[dict[str, Tensor]]:
    """θ_s − θ*, float64, one sample after another.

    Where the budget has no room for all that are drawn together, they are drawn again for each
    part of them.
    """
    size = sum(value.numel() for value in posterior.mode.values())
    room = posterior.network.budget.samples(size, DRAWN_TOGETHER)
    for start in range(0, n, DRAWN_TOGETHER):
        count, state = min(DRAWN_TOGETHER, n - start), generator.get_state()
        for first in range(0, count, room):
            generator.set_state(state)
            drawn = posterior.deviations(count, generator, slice(first, first + room))
            for s in range(min(room, count - first)):
                yield {name: value[s] for name, value in drawn.items()}
