"""Binary classification: logits on their own, with or without a weight of the positive class."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.checks import (
    check_length,
    check_same_layout,
    elementwise_target,
    loss_weight,
)
from kfac_laplace.likelihoods.likelihood import Likelihood


class Bernoulli(Likelihood):
    """Logistic likelihood of each logit on its own: Λ = diag(p (1 − p)).

    The loss is that of `torch.nn.functional.binary_cross_entropy_with_logits` with
    reduction="sum": −[w y log p + (1 − y) log(1 − p)], so that m(y) = w y + 1 − y for each logit.
    With w ≠ 1 its exponential is no normalised density; the evidence takes the loss as it stands.

    Args:
        pos_weight: w ≥ 0, one value or one for each output (the last axis of the model's output).

    Raises:
        InvalidValue: negative or non-finite weights.
        InvalidType: weights that are no numbers.
    """

    def __init__(self, *, pos_weight: Tensor | Sequence[float] | float | None = None):
        self.pos_weight = None if pos_weight is None else loss_weight(pos_weight, "pos_weight")

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last axis."""
        check_same_layout(output, target)
        return -1

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Targets in [0, 1] of any real dtype, as (n, t, c)."""
        if target.numel() == f.numel() and target.shape[:1] == f.shape[:1]:
            target = target.reshape(f.shape)
        y = elementwise_target(target.to(f.dtype), f)
        if float(y.min()) < 0 or float(y.max()) > 1:
            raise InvalidValue(
                "binary targets outside [0, 1]",
                where="target",
                got=f"values {float(y.min())}..{float(y.max())}",
                remedy="Pass 0 and 1",
            )
        if self.pos_weight is not None:
            check_length(self.pos_weight, (1, f.shape[-1]), "pos_weight")
        return y

    def positive(self, y: Tensor) -> Tensor:
        """w y, the weight of log p in the loss; that of log(1 − p) is 1 − y."""
        return y if self.pos_weight is None else y * self.pos_weight.to(y)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ w y log p + (1 − y) log(1 − p), shape (n,)."""
        weight = None if self.pos_weight is None else self.pos_weight.to(f)
        losses = F.binary_cross_entropy_with_logits(f, y, pos_weight=weight, reduction="none")
        return -losses.flatten(1).sum(1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood itself."""
        return self.log_prob(f.double(), y.double(), torch.ones(())).sum()

    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """The summed statistic."""
        return statistic

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """m(y) sigmoid(f) − w y."""
        importance = self.importance(y)
        p = f.sigmoid()
        return (p if importance is None else importance * p) - self.positive(y)

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """One column for each logit: √(p (1 − p))."""
        # σ(f) σ(−f) keeps its digits where 1 − σ(f) rounds to zero.
        spread = (f.sigmoid() * (-f).sigmoid()).sqrt()
        for c in range(f.shape[-1]):
            column = torch.zeros_like(f)
            column[..., c] = spread[..., c]
            yield column

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Draw zeros and ones."""
        noise = torch.rand(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        return (noise.to(f.device) < f.sigmoid()).to(f.dtype)

    def random_root(self, f: Tensor, generator: Generator) -> Tensor:
        """sigmoid(f) minus a draw, without the weight."""
        return f.sigmoid() - self.sample(f, generator)

    def hessian(self, f: Tensor) -> Tensor:
        """diag(p (1 − p))."""
        return torch.diag_embed(f.sigmoid() * (-f).sigmoid())

    def importance(self, y: Tensor) -> Tensor | None:
        """w y + 1 − y for each logit, (n, t, c)."""
        return None if self.pos_weight is None else self.positive(y) + (1 - y)

    def options(self) -> dict[str, Any]:
        """`pos_weight` as a list."""
        return {"pos_weight": None if self.pos_weight is None else self.pos_weight.tolist()}
