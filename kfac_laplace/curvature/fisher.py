"""Backward vectors: v (n, t, c) whose outer products sum to D Λ D, exactly or in expectation.

Blocks of the GGN are Σ_v Σ_n (Jᵀv)(Jᵀv)ᵀ. Positions of one example must not share a vector unless
their cross terms vanish in expectation, because layers may mix positions. D = diag √m holds the
likelihood's `importance` of each target: class weights, ignored labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.options import check_whole


class Fisher(Protocol):
    """Which backward vectors stand for the curvature D Λ D of the likelihood."""

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Vectors (n, t, c) for aligned outputs f (n, t, c) and targets y, at σ = 1."""


@dataclass(frozen=True)
class Exact:
    """All roots of D Λ D: t·(c − 1) vectors for softmax, t·c for the others.

    With several positions each vector is zero outside one of each example's: a pass for all
    positions at once would add cross terms wherever layers mix positions. Positions that do not
    count take no turn, so t is the largest number of those that do.
    """

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """One vector for each position that counts and each root."""
        importance = likelihood.importance(y)
        turn, last = _turns(f, importance)
        if not last:  # nothing counts: sums still take their dtype from a vector
            yield torch.zeros_like(f)
            return
        for root in likelihood.roots(f):
            weighted = _weighted(root, importance)
            if f.shape[1] == 1:
                yield weighted
                continue
            for now in range(1, last + 1):
                yield weighted.where(turn == now, 0)


@dataclass(frozen=True)
class MonteCarlo:
    """Scores at labels drawn from the model, times D: unbiased, `samples` vectors.

    Args:
        samples: number of label draws for each example.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        """Check the number of samples."""
        check_whole("samples", self.samples, 1)

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Scores over √samples, with fresh labels for every example and position."""
        importance = likelihood.importance(y)
        for _ in range(self.samples):
            root = likelihood.random_root(f, generator)
            yield _weighted(root, importance) / self.samples**0.5


@dataclass(frozen=True)
class Empirical:
    """Scores at the observed labels: Σ_n ∇ℓ_n ∇ℓ_nᵀ, one vector. Not the GGN away from a fit."""

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """The score of each example."""
        yield likelihood.score(f, y)


def _weighted(root: Tensor, importance: Tensor | None) -> Tensor:
    """D times the root, shape (n, t, c)."""
    return root if importance is None else importance.to(root).sqrt() * root


def _turns(f: Tensor, importance: Tensor | None) -> tuple[Tensor, int]:
    """When each position of an example has its turn, 1, 2, … or 0 for never, and the last turn."""
    every = torch.ones(f.shape[:2], dtype=torch.bool, device=f.device)
    counts = every if importance is None else (importance != 0).any(-1)
    turn = counts.cumsum(1) * counts  # (n, t)
    return turn[..., None], int(turn.max())


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
