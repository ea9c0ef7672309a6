"""The part of the training loss that the data make."""

from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.likelihoods import Likelihood


def negative_log_likelihood(
    likelihood: Likelihood, output: Tensor, target: Tensor, sigma: Tensor
) -> Tensor:
    """(1/B) Σ −log p(y | f, σ) over the B examples of a batch, in at least single precision.

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
    return -likelihood.log_prob(f, y, sigma.to(f)).mean()
