"""Backward vectors: v (n, t, c) whose outer products sum to D Λ D, exactly or in expectation.

Blocks of the GGN are Σ_v Σ_n (Jᵀv)(Jᵀv)ᵀ. Positions of one example must not share a vector unless
their cross terms vanish in expectation, because layers may mix positions. D = diag √m holds the
likelihood's `importance` of each target: class weights, ignored labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.linalg.dtypes import in_double
from kfac_laplace.devices import sent
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.likelihoods.stick_breaking import StickBreaking
from kfac_laplace.options import check_whole, unknown


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

    def count(self, likelihood: Likelihood, f: Tensor, y: Tensor) -> int:
        """How many vectors these are."""
        _, last = _turns(f, likelihood.importance(y))
        row = torch.zeros(1, 1, f.shape[-1], device="cpu")
        softmax = likelihood.softmax_probabilities(row) is not None
        roots = f.shape[-1] - 1 if softmax else sum(1 for _ in likelihood.roots(row))
        return max(1, last * roots)


@dataclass(frozen=True)
class MonteCarlo:
    """Scores at labels drawn from the model, times D: unbiased, `samples` vectors.

    Args:
        samples: number of label draws for each example.

    Example:
        One backward pass a draw, however many classes there are:

        >>> import torch
        >>> from kfac_laplace import Curvature, MonteCarlo
        >>> model, x, y = torch.nn.Linear(3, 1000), torch.ones(2, 3), torch.tensor([7, 999])
        >>> curvature = Curvature(model, "classification", fisher=MonteCarlo(samples=4))
        >>> curvature.accumulate(x, y).n_data
        2
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


@dataclass(frozen=True)
class Hybrid:
    """The leading roots of D Λ D exactly, the others times random signs in one vector: unbiased.

    Softmax roots are stick-breaking columns with the classes of each row in order of probability,
    so that few of them hold most of the curvature; roots of other likelihoods come in their own
    order. As many passes as there are roots (C − 1 for softmax) leave nothing to chance.

    Every vector serves all positions at once, with independent signs for each of them. Where the
    layers mix positions, their cross terms vanish in expectation alone, however many passes.

    Args:
        passes: number k of vectors, k − 1 of which are roots; by default `tolerance` decides.
        tolerance: share of the trace of D Λ D over a batch that may be left to random signs.

    Example:
        The model wavers between two of six classes, so that a single root holds nearly all:

        >>> import torch
        >>> from kfac_laplace import Categorical, Exact, Hybrid
        >>> f, y = torch.tensor([[[6.0, 5.0, 0.0, 0.0, 0.0, 0.0]]]), torch.tensor([[1]])
        >>> draws = torch.Generator().manual_seed(0)
        >>> for fisher in (Exact(), Hybrid(), Hybrid(passes=3)):
        ...     len(list(fisher.vectors(Categorical(), f, y, draws)))
        5
        2
        3
    """

    passes: int | None = None
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        """Check both numbers."""
        if self.passes is not None:
            check_whole("passes", self.passes, 1)
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, Real):
            raise InvalidType("not a number", where="tolerance", got=repr(self.tolerance))
        if not 0 <= self.tolerance <= 1:
            raise InvalidValue("a share lies in [0, 1]", where="tolerance", got=self.tolerance)

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """The leading roots, then the signed sum of the others."""
        importance = likelihood.importance(y)
        p = likelihood.softmax_probabilities(f)
        columns = _InOrder(likelihood, f) if p is None else _ByProbability(p)
        traces = columns.traces(importance)
        coins = torch.randint(
            2, (*f.shape[:2], len(traces)), generator=generator, device=generator.device
        )
        signs = sent(2 * coins - 1, f.device).to(f.dtype)  # (n, t, r)
        for vector in columns.vectors(signs, self._count(traces)):
            yield _weighted(vector, importance)

    def _count(self, traces: Tensor) -> int:
        """How many vectors stand for roots with these traces (r,)."""
        if self.passes is not None:
            return min(self.passes, len(traces))
        left = traces.flip(0).cumsum(0).flip(0)  # beyond k roots
        left[-1] = 0  # one root alone is exact with either sign
        return int((left <= self.tolerance * traces.sum()).nonzero()[0]) + 1


class _Columns(Protocol):
    """The roots S_0 … S_{r−1} of Λ in the order in which they are taken."""

    def traces(self, importance: Tensor | None) -> Tensor:
        """Σ_{n,t} |D S_k|², shape (r,)."""

    def vectors(self, signs: Tensor, count: int) -> Iterator[Tensor]:
        """Signed roots (n, t, c), the last `count` vector the sum of all that are left."""


class _ByProbability:
    """Softmax roots, the most probable classes of each row first."""

    def __init__(self, p: Tensor):
        ordered, self._order = p.sort(-1, descending=True)
        self._columns = StickBreaking(ordered)

    def traces(self, importance: Tensor | None) -> Tensor:
        squares = in_double(self._columns.squares())
        return (squares if importance is None else importance.to(squares) * squares).sum((0, 1))

    def vectors(self, signs: Tensor, count: int) -> Iterator[Tensor]:
        for c in range(count - 1):
            yield self._unsorted(signs[..., c, None] * self._columns.column(c))
        left = torch.arange(signs.shape[-1], device=signs.device) >= count - 1
        yield self._unsorted(self._columns.mixed(signs * left))

    def _unsorted(self, vector: Tensor) -> Tensor:
        return torch.zeros_like(vector).scatter(-1, self._order, vector)


class _InOrder:
    """The roots of any likelihood as they come."""

    def __init__(self, likelihood: Likelihood, f: Tensor):
        self._likelihood, self._f = likelihood, f

    def traces(self, importance: Tensor | None) -> Tensor:
        roots = self._likelihood.roots(self._f)
        return torch.stack(
            [in_double(_weighted(root, importance)).square().sum() for root in roots]
        )

    def vectors(self, signs: Tensor, count: int) -> Iterator[Tensor]:
        left = torch.zeros_like(self._f)
        for k, root in enumerate(self._likelihood.roots(self._f)):
            if k < count - 1:
                yield signs[..., k, None] * root
            else:
                left = left + signs[..., k, None] * root
        yield left


def _weighted(root: Tensor, importance: Tensor | None) -> Tensor:
    """D times the root, shape (n, t, c)."""
    return root if importance is None else importance.to(root).sqrt() * root


def _turns(f: Tensor, importance: Tensor | None) -> tuple[Tensor, int]:
    """When each position of an example has its turn, 1, 2, … or 0 for never, and the last turn."""
    if importance is None:
        turn = torch.arange(1, f.shape[1] + 1, device=f.device).expand(f.shape[:2])
        return turn[..., None], f.shape[1]
    every = torch.ones(f.shape[:2], dtype=torch.bool, device=f.device)
    counts = every if importance is None else (importance != 0).any(-1)
    turn = counts.cumsum(1) * counts  # (n, t)
    return turn[..., None], int(turn.max())


FisherName = Literal["exact", "hybrid", "mc", "empirical"]
NAMED: dict[str, type[Fisher]] = {
    "exact": Exact,
    "hybrid": Hybrid,
    "mc": MonteCarlo,
    "empirical": Empirical,
}


def resolve(fisher: str | Fisher) -> Fisher:
    """The estimator named by a string, or the object itself."""
    if isinstance(fisher, str):
        if fisher not in NAMED:
            raise unknown("fisher", fisher, NAMED, "pass an object such as MonteCarlo(4)")
        return NAMED[fisher]()
    if not hasattr(fisher, "vectors"):
        raise InvalidType(
            "not an estimator",
            where="fisher",
            got=type(fisher).__name__,
            remedy=f"Choose one of {sorted(NAMED)} or an object with a `vectors` method",
        )
    return fisher
