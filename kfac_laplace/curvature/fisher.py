"""Backward vectors: tensors v (n, t, c) whose outer products sum to Λ, exactly or in expectation.

Blocks of the GGN are Σ_v Σ_n (Jᵀv)(Jᵀv)ᵀ. Positions of one example must not share a vector unless
their cross terms vanish in expectation, because layers may mix positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Likelihood


class Fisher(Protocol):
    """Which backward vectors stand for the curvature Λ of the likelihood."""

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Vectors (n, t, c) for aligned outputs f (n, t, c) and targets y, at σ = 1."""


@dataclass(frozen=True)
class Exact:
    """All roots of Λ: t·(c − 1) vectors for softmax, t·c for the others.

    With several positions each vector is zero outside one of them: a pass for all positions at
    once would add cross terms wherever layers mix positions.
    """

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """One vector for each position and root."""
        positions = f.shape[1]
        for root in likelihood.roots(f):
            if positions == 1:
                yield root
                continue
            for t in range(positions):
                vector = torch.zeros_like(root)
                vector[:, t] = root[:, t]
                yield vector


@dataclass(frozen=True)
class MonteCarlo:
    """Scores at labels drawn from the model: unbiased, `samples` vectors.

    Args:
        samples: number of label draws for each example.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        """Check the number of samples."""
        if self.samples < 1:
            raise InvalidValue(
                "at least one sample is needed",
                where="MonteCarlo",
                got=self.samples,
                remedy="Pass samples >= 1",
            )

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Scores over √samples, with fresh labels for every example and position."""
        for _ in range(self.samples):
            yield likelihood.score(f, likelihood.sample(f, generator)) / self.samples**0.5


@dataclass(frozen=True)
class Empirical:
    """Scores at the observed labels: Σ_n ∇ℓ_n ∇ℓ_nᵀ, one vector. Not the GGN away from a fit."""

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """The score of each example."""
        yield likelihood.score(f, y)


NAMED: dict[str, type[Fisher]] = {"exact": Exact, "mc": MonteCarlo, "empirical": Empirical}


def resolve(fisher: str | Fisher) -> Fisher:
    """The estimator named by a string, or the object itself."""
    if isinstance(fisher, str):
        if fisher not in NAMED:
            raise InvalidValue(
                "unknown estimator",
                where="fisher",
                got=repr(fisher),
                remedy=f"Choose one of {sorted(NAMED)} or pass an object such as MonteCarlo(4)",
            )
        return NAMED[fisher]()
    if not hasattr(fisher, "vectors"):
        raise InvalidType(
            "not an estimator",
            where="fisher",
            got=type(fisher).__name__,
            remedy=f"Choose one of {sorted(NAMED)} or an object with a `vectors` method",
        )
    return fisher
