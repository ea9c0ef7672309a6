"""The two parts of the training loss: what the data make, and what the prior makes at first."""

from torch import Tensor

from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import accumulable
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
    target = target.to(output.device)
    axis = likelihood.class_axis(output, target)
    f = accumulable(likelihood.align(output, axis))
    y = likelihood.align_target(target, f.detach())
    return likelihood.log_prob(f, y, sigma.to(f)).mean()


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
