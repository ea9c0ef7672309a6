"""The two parts of the training loss: what the data make, and what the prior makes at first."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.first_pass import warn_of_activation
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.model.forward import as_output
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.rows.layout import flat_layout
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood, aligned_target
from kfac_laplace.posterior.layouts import Layouts
from kfac_laplace.posterior.prior import Given, Prior
from kfac_laplace.posterior.sharing import Scalar


def output_and_target(returned: Any, target: Any) -> tuple[Tensor, Tensor]:
    """What a model returned as one tensor, and targets for each of its rows on the same device.

    Args:
        returned: a tensor, or whatever `Laplace` takes a model to return.
        target: the targets.

    Raises:
        InvalidType: no output among what the model returned, or targets that are no tensor.
        InvalidValue: no examples, or not as many outputs as targets.
    """
    output = as_output(returned)
    if not isinstance(target, Tensor) or target.is_inference():
        _, target = split_batch((output, target), "")
    output = _of_examples(output, target)
    rows = (output.ndim and output.shape[0], target.ndim and target.shape[0])
    if output.ndim and target.ndim and rows == (0, 0):
        raise InvalidValue(
            "a batch without examples",
            where="output",
            got=f"an output {tuple(output.shape)}",
            remedy="Drop it",
        )
    if rows[0] != rows[1] or not rows[0]:
        raise InvalidValue(
            "outputs and targets differ in their number of examples",
            where="batch",
            got=f"output {tuple(output.shape)}, target {tuple(target.shape)}",
            remedy="The first axis must run over the examples",
        )
    return output, target.to(output.device)


def mean_log_likelihood(
    likelihood: Likelihood, output: Tensor, target: Tensor, sigma: Tensor, axis: int
) -> Tensor:
    """(1/B) Σ log p(y | f, σ) over the B examples of a batch, in at least single precision.

    Args:
        likelihood: p(y | f).
        output: what the model returned.
        target: its targets, checked against the output.
        sigma: σ, shape ().
        axis: axis of the output that holds the outputs of one row.

    Raises:
        InvalidValue: targets of a wrong shape or range.
        InvalidType: targets of a wrong dtype.
    """
    f = accumulable(likelihood.align(output, axis))
    y = aligned_target(likelihood, target, output.shape, f.detach(), axis)
    return likelihood.log_prob(f, y, sigma.to(f)).mean()


def unexplained(likelihood: Likelihood, fit: Tensor, outputs: int, sigma: Tensor) -> Tensor:
    """What a batch's outputs leave unexplained, whatever σ is: a loss that says how training goes.

    Args:
        likelihood: p(y | f).
        fit: mean log-likelihood of its examples at σ.
        outputs: of an example.
        sigma: σ, shape ().

    Returns:
        The negative log-likelihood, and with Gaussian noise the sum of squares, of an example.
    """
    if not likelihood.has_gaussian_noise:
        return -fit
    variance = sigma.to(fit) ** 2
    return -variance * (2 * fit + outputs * (2 * math.pi * variance).log())


def statistic_of_batch(
    likelihood: Likelihood, measure: Tensor, output: Tensor, target: Tensor, axis: int
) -> Tensor:
    """The likelihood's sum over a batch, as a curvature pass would make it of these outputs.

    Args:
        likelihood: p(y | f).
        measure: `unexplained` of the batch.
        output: what the model returned.
        target: its targets.
        axis: axis of the output that holds the outputs of one row.
    """
    if likelihood.has_gaussian_noise:
        return len(output) * measure.detach().double()
    if not likelihood.has_noise:
        return -len(output) * measure.detach().double()
    with torch.no_grad():
        f = accumulable(likelihood.align(output.detach(), axis))
        y = aligned_target(likelihood, target, output.shape, f, axis)
        return likelihood.statistic(f, y)


def constant_unexplained(ggn: GGN) -> float:
    """What the best constant prediction leaves unexplained; NaN where it is not known."""
    if ggn.likelihood.has_gaussian_noise:
        return float(ggn.likelihood.target_spread(ggn.targets) ** 2 * ggn.n_outputs / ggn.n_rows)
    return -ggn.likelihood.constant_log_likelihood(ggn.targets) / float(ggn.n_rows)


def looked_at(known: Knowledge, likelihood: Likelihood, output: Tensor, axis: int) -> Knowledge:
    """Warn, once, where the model's outputs went through a softmax or sigmoid.

    Args:
        known: what is known about the model.
        likelihood: p(y | f).
        output: what the model returned.
        axis: axis of the output that holds the outputs of one row.

    Returns:
        What is known after.
    """
    if known.interface.looked:
        return known
    warn_of_activation(likelihood.activation(accumulable(likelihood.align(output, axis))))
    return replace(known, interface=replace(known.interface, looked=True))


def _of_examples(output: Tensor, target: Tensor) -> Tensor:
    """The output with the axis of examples that `squeeze()` took from a single one."""
    return Interface().with_examples(output, len(target) if target.ndim else 1)


def undivided_prior(network: Network, tracked: tuple[str, ...], mean: Given) -> Prior:
    """The prior before it is known which parameters share a block: one precision for all.

    Args:
        network: the model.
        tracked: names of the parameters in the posterior.
        mean: as `prior_mean` of `Laplace`.
    """
    shapes = {name: p.shape for name, p in network.parameters(tracked).items()}
    layouts = Layouts({"all": flat_layout(shapes)}, tuple(shapes))
    return Prior.of(Scalar(), layouts, mean, network.device)
