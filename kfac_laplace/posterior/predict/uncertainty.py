"""Parts of uncertainty as values: variances of y, and nats at each position."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Latent, Likelihood

#: What inputs may be ranked by.
SCORES = ("last_layer", "entropy", "epistemic", "variance", "max_prob")


@dataclass(frozen=True)
class Variances:
    """Var y = Var E[y | f] + E Var[y | f], each shaped like `Predictive.mean`.

    Args:
        epistemic: variance of the expectation, which more data could remove.
        aleatoric: expected variance, which they could not.
    """

    epistemic: Tensor
    aleatoric: Tensor

    @property
    def total(self) -> Tensor:
        """Var y."""
        return self.epistemic + self.aleatoric


@dataclass(frozen=True)
class Uncertainty:
    """Entropy of y and its parts in nats by position, shaped like labels: (n,) or (n, ...).

    Positions that do not count have 0.

    Args:
        entropy: of y as the link has it.
        epistemic: mutual information of y and the parameters.
        aleatoric: expected entropy where the parameters are known.
    """

    entropy: Tensor
    epistemic: Tensor
    aleatoric: Tensor


def by_row(latent: Latent) -> Latent:
    """Each output row as an example of its own, (n t, 1, c), with the same draws."""
    samples = latent.samples
    return Latent(
        latent.mean.flatten(0, 1)[:, None],
        latent.covariance.flatten(0, 1)[:, None],
        None if samples is None else samples.flatten(1, 2)[:, :, None],
        latent.seed,
        latent.n_samples,
    )


def counted_positions(likelihood: Likelihood, counts: Tensor | None, like: Tensor) -> Tensor:
    """1 where a position counts, else 0, shaped as `like`.

    Args:
        likelihood: knows which label is ignored.
        counts: a mask, or labels; None: all.
        like: values, one for each position.

    Raises:
        InvalidValue: another shape, or labels of a likelihood that ignores none.
        InvalidType: neither truth values nor whole numbers.
    """
    if counts is None:
        return torch.ones_like(like)
    if not isinstance(counts, Tensor) or counts.is_floating_point() or counts.is_complex():
        raise InvalidType(
            "neither a mask nor labels",
            where="counts",
            got=getattr(counts, "dtype", type(counts).__name__),
            remedy="Pass a boolean tensor, or labels as the loss takes them",
        )
    if counts.shape != like.shape:
        raise InvalidValue(
            "one entry for each position is wanted",
            where="counts",
            got=f"{tuple(counts.shape)} for positions {tuple(like.shape)}",
            remedy="Masks and labels have the output's shape without its class axis",
        )
    if counts.dtype != torch.bool:
        ignored = getattr(likelihood, "ignore_index", None)
        if ignored is None:
            raise InvalidValue(
                "this likelihood ignores no label",
                where="counts",
                got=type(likelihood).__name__,
                remedy="Pass a boolean mask",
            )
        counts = counts != ignored
    return counts.to(like)
