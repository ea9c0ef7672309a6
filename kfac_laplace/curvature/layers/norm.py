"""Scale and shift of normalised activations: exact blocks, without a pass through the whole model.

The statistics must belong to one example (layer, group, instance, RMS norm) or to the model (batch
norm with running statistics): batch statistics mix the examples, and no example has a Jacobian of
its own then.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.elementwise import scaled
from kfac_laplace.curvature.layers.registry import Layer, guard, layer_rule
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.errors import UnsupportedUse


@layer_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Layer | None:
    """An entry for each place in an example's last axes, repeated over all leading axes."""
    if weight is None:
        return None
    normalised = F.layer_norm(accumulable(input.detach()), normalized_shape, eps=eps)
    return scaled(weight, bias, input, normalised, _last(input, normalized_shape))


@layer_rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Layer | None:
    """As layer norm, without mean and shift."""
    if weight is None:
        return None
    # Without `eps` torch takes the machine epsilon of the precision in which it sums: float32 too
    # for inputs in half precision.
    normalised = F.rms_norm(accumulable(input.detach()), normalized_shape, eps=eps)
    return scaled(weight, None, input, normalised, _last(input, normalized_shape))


@layer_rule(F.group_norm, torch.group_norm)
def group_norm(
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Layer | None:
    """An entry for each channel (axis 1), normalised over groups of channels and the space."""
    if weight is None:
        return None
    normalised = F.group_norm(accumulable(input.detach()), num_groups, eps=eps)
    return scaled(weight, bias, input, normalised, [1])


@layer_rule(F.instance_norm)
def instance_norm(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Layer | None:
    """An entry for each channel, normalised over its space or by running statistics."""
    if not use_input_stats:
        return batch_norm(output, input, running_mean, running_var, weight, bias, eps=eps)
    if weight is None:
        return None
    # Without the running statistics, which the call itself has updated already.
    normalised = F.instance_norm(accumulable(input.detach()), eps=eps)
    return scaled(weight, bias, input, normalised, [1])


@layer_rule(torch.instance_norm)
def native_instance_norm(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Layer | None:
    """The same with torch's own order of arguments."""
    statistics = running_mean, running_var
    return instance_norm(output, input, *statistics, weight, bias, use_input_stats, eps=eps)


@layer_rule(F.batch_norm)
def batch_norm(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Layer | None:
    """An entry for each channel, normalised by running statistics."""
    if weight is None or training or running_mean is None or running_var is None:
        return None
    channels = (-1, *(1,) * (input.ndim - 2))
    mean, variance = (accumulable(t).view(channels) for t in (running_mean, running_var))
    normalised = (accumulable(input.detach()) - mean) * (variance + eps).rsqrt()
    return scaled(weight, bias, input, normalised, [1])


@layer_rule(torch.batch_norm)
def native_batch_norm(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Layer | None:
    """The same with torch's own order of arguments."""
    return batch_norm(output, input, running_mean, running_var, weight, bias, training, eps=eps)


@guard(F.batch_norm)
def refuse_batch_statistics(
    with_data: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    """Raise `UnsupportedUse` where the statistics come from the batch, and not from a weight."""
    if not with_data or (not training and running_mean is not None and running_var is not None):
        return
    raise UnsupportedUse(
        "batch norm with the statistics of the batch mixes the examples, so that no example has "
        "a Jacobian of its own",
        where="model",
        got="training mode" if training else "no running statistics",
        remedy="Put the layer in evaluation mode with running statistics "
        "(track_running_stats=True), or use another norm (group, layer, instance)",
    )


@guard(torch.batch_norm)
def refuse_native_batch_statistics(
    with_data: bool,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> None:
    """The same with torch's own order of arguments."""
    refuse_batch_statistics(with_data, input, running_mean, running_var, training=training)


def _last(input: Tensor, normalized_shape: list[int]) -> range:
    """The last axes of an input."""
    return range(input.ndim - len(normalized_shape), input.ndim)
