"""What a likelihood has to say about itself."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor


class Likelihood(ABC):
    """p(y | f) for one output row f, independent over examples and positions.

    The curvature of a row is D Λ(f) D: Λ comes from `roots`, `random_root` and `hessian` and does
    not depend on the target; D = diag √m(y) comes from `importance` and is 1 unless overridden.
    """

    #: whether the likelihood has an observation noise σ
    has_noise = False

    @abstractmethod
    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """Axis of `output` that holds the c outputs of one row, -1 or 1."""

    def align(self, output: Tensor, class_axis: int) -> Tensor:
        """View `output` as f (n, t, c), differentiably."""
        if output.ndim == 1:
            return output[:, None, None]
        if class_axis == 1:
            output = output.movedim(1, -1)
        return output.flatten(1, -2) if output.ndim > 2 else output[:, None]

    @abstractmethod
    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Check `target` against f (n, t, c) and view it as (n, t) labels or (n, t, c) values."""

    @abstractmethod
    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """log p(y | f, σ) summed over positions and outputs, normalisers included, shape (n,)."""

    @abstractmethod
    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """Σ over the batch of what `log_likelihood` needs, float64, shape ()."""

    @abstractmethod
    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """log p(D | f, σ) from the summed statistic over `count` scalar outputs, shape ()."""

    @abstractmethod
    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """∂(−log p(y | f))/∂f at σ = 1, shape (n, t, c)."""

    @abstractmethod
    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """Columns S_k (n, t, c) with Σ_k S_k S_kᵀ = Λ for each row, at σ = 1."""

    @abstractmethod
    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Draw aligned targets y ~ p(y | f) at σ = 1."""

    def random_root(self, f: Tensor, generator: Generator) -> Tensor:
        """A vector v (n, t, c) with E v vᵀ = Λ, independent between rows: the score of a draw.

        Where `importance` is overridden, this has to stay the score without it.
        """
        return self.score(f, self.sample(f, generator))

    @abstractmethod
    def hessian(self, f: Tensor) -> Tensor:
        """Λ for each row at σ = 1, shape (n, t, c, c)."""

    def importance(self, y: Tensor) -> Tensor | None:
        """Factors m ≥ 0 on the curvature of targets y, or None where all are 1.

        Returns:
            Shape (n, t, 1), or (n, t, c) where the outputs have factors of their own (Λ is diagonal
            then, so that D Λ D = m Λ). A row of zeros has no curvature at all.
        """
        return None

    def precision(self, sigma: Tensor) -> Tensor:
        """Factor 1/σ² by which the stored curvature is scaled; 1 without noise."""
        return torch.ones_like(sigma)

    def options(self) -> dict[str, Any]:
        """Constructor arguments as plain data, which tell likelihoods of one class apart."""
        return {}
