"""The two parts of the training loss: what the data make, and what the prior makes at first."""

from dataclasses import replace

from torch import Tensor

from kfac_laplace.curvature.gradients.first_pass import warn_of_activation
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.rows.layout import flat_layout
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.posterior.layouts import Layouts
from kfac_laplace.posterior.prior import Given, Prior
from kfac_laplace.posterior.sharing import Scalar


def mean_log_likelihood(
    likelihood: Likelihood, output: Tensor, target: Tensor, sigma: Tensor
) -> Tensor:
    """(1/B) Σ log p(y | f, σ) over the B examples of a batch, in at least single precision.

    Args:
        likelihood: p(y | f).
        output: what the model returned.
        target: its targets, checked against the output.
        sigma: σ, shape ().

    Raises:
        InvalidValue: targets of a wrong shape or range.
        InvalidType: targets of a wrong dtype.
    """
    output, target = _of_examples(output, target), target.to(output.device)
    axis = likelihood.class_axis(output, target)
    f = accumulable(likelihood.align(output, axis))
    y = likelihood.align_target(target, f.detach())
    return likelihood.log_prob(f, y, sigma.to(f)).mean()


def looked_at(
    known: Knowledge, likelihood: Likelihood, output: Tensor, target: Tensor
) -> Knowledge:
    """Warn, once, where the model's outputs went through a softmax or sigmoid.

    Args:
        known: what is known about the model.
        likelihood: p(y | f).
        output: what the model returned.
        target: its targets, of the right shape.

    Returns:
        What is known after.
    """
    if known.interface.looked:
        return known
    output = _of_examples(output, target)
    f = likelihood.align(output, likelihood.class_axis(output, target.to(output.device)))
    warn_of_activation(likelihood.activation(accumulable(f)))
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
