"""The blocks of one batch: sums over backward vectors, group by group."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.accumulators import (
    Accumulator,
    DenseAccumulator,
    DiagonalAccumulator,
    EigenAccumulator,
)
from kfac_laplace.curvature.estimate.blocks import Bases, Block
from kfac_laplace.curvature.estimate.fisher import Exact, Fisher
from kfac_laplace.curvature.estimate.head import Cut, find_cut
from kfac_laplace.curvature.estimate.kronecker_accumulator import KroneckerAccumulator
from kfac_laplace.curvature.estimate.low_rank import LowRankAccumulator
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.estimate.shared_grams import SharedGrams
from kfac_laplace.curvature.estimate.structures import (
    Kron,
    LowRank,
    Structure,
    is_factored,
    name_of,
)
from kfac_laplace.curvature.gradients.by_group import copied_gradients
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import SumDtype, without_autocast
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.recording.backward import Backward

#: takes vectors to those that are sent back
Passing = Callable[[Iterator[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True)
class Estimand:
    """What is estimated, and how.

    Args:
        structure: "kron", "ekfac", "diag", "full", a `LowRank` or a `Kron`.
        settings: expand or reduce, by name of the groups with Kronecker factors.
        fisher: which backward vectors.
        dtype: the precision of products and sums.
        widest: of input factors with more columns only the diagonal is wanted; None: of none.
        bases: eigenvectors of the factors by group, for "ekfac".
        passing: what the vectors pass through on their way, one by one: who counts or times them,
            or lets some of them through alone.
        home: where blocks lie, if not on the device of the pass: each goes there as it is made.
        foreseen: how many vectors were to come where `passing` lets fewer through: sums then
            multiply few rows from the first on if many were to come.
    """

    structure: Structure
    settings: Mapping[str, Setting]
    fisher: Fisher
    dtype: SumDtype = SumDtype()
    widest: int | None = None
    bases: Mapping[str, Bases] = field(default_factory=dict)
    passing: Passing | None = None
    foreseen: int = 0
    home: torch.device | None = None


def estimate(
    passed: ForwardPass, estimand: Estimand, y: Tensor, generator: Generator
) -> dict[str, Block]:
    """The blocks of a recorded pass, by name of their groups, or one block "full" or "lowrank".

    Args:
        passed: the forward pass, with the groups of its parameters known.
        estimand: what is wanted.
        y: aligned targets.
        generator: source of labels and signs.
    """
    made = accumulators(passed, estimand)
    for part in made.values() if estimand.foreseen else ():
        part.foresee(estimand.foreseen)
    cut = find_cut(passed, estimand.dtype) if _may_cut(estimand) else None
    if cut is None:
        vectors = estimand.fisher.vectors(passed.likelihood, passed.outputs.detach(), y, generator)
        at_a_time = vectors_at_once(passed) if estimand.passing is None else 1
        _add_vectors(passed, _sent_back(estimand, vectors), at_a_time, made)
    else:
        made = _add_cut(cut, _sent_back(estimand, cut.roots()), made)
    return finished(passed, made, estimand.home)


def estimate_all(
    passed: ForwardPass, estimands: Sequence[Estimand], fisher: Fisher, y: Tensor
) -> list[dict[str, Block]]:
    """The blocks of several estimands, of the same vectors: each is sent back once for all.

    Args:
        passed: as for `estimate`.
        estimands: what is wanted, but for the vectors.
        fisher: whose vectors, by a generator of its own.
        y: aligned targets.
    """
    made = [accumulators(passed, estimand) for estimand in estimands]
    every = {f"{k} {name}": part for k, own in enumerate(made) for name, part in own.items()}
    vectors = fisher.vectors(
        passed.likelihood, passed.outputs.detach(), y, Generator().manual_seed(0)
    )
    _add_vectors(passed, vectors, 1, every)
    del every
    return [finished(passed, own) for own in made]


def accumulators(passed: ForwardPass, estimand: Estimand) -> dict[str, Accumulator]:
    """An empty sum for each block; arguments as for `estimate`."""
    groups = passed.knowledge.groups
    with without_autocast(passed.device):
        if estimand.structure == "full":
            layout = passed.knowledge.full_layout
            return {"full": DenseAccumulator(groups, layout, passed, estimand.dtype)}
        if isinstance(estimand.structure, LowRank):
            layout, rank = passed.knowledge.full_layout, estimand.structure.rank
            return {"lowrank": LowRankAccumulator(groups, layout, passed, estimand.dtype, rank)}
        shared = SharedGrams()
        return {group.name: _accumulator(passed, estimand, group, shared) for group in groups}


def finished(
    passed: ForwardPass, made: dict[str, Accumulator], home: torch.device | None = None
) -> dict[str, Block]:
    """The blocks of sums to which all vectors have been added; `made` is emptied."""
    # One by one, so that the sums of a finished block need no memory beside the next.
    with without_autocast(passed.device):
        blocks = {}
        for name in list(made):
            block = made.pop(name).block()
            blocks[name] = block if home is None else block.placed(passed.device, home)
        return blocks


def _accumulator(
    passed: ForwardPass, estimand: Estimand, group: Group, shared: SharedGrams
) -> Accumulator:
    """The sum for a group's block, by its structure."""
    treatment = group.treatment if is_factored(estimand.structure) else "diag"
    if treatment == "kron" and estimand.structure == "ekfac":
        return EigenAccumulator(group, passed, estimand.bases[group.name])
    if treatment == "kron":
        setting = estimand.settings[group.name]
        rank = estimand.structure.rank if isinstance(estimand.structure, Kron) else None
        return KroneckerAccumulator(
            group, passed, setting, estimand.dtype, estimand.widest, shared, rank, estimand.home
        )
    if treatment == "dense":
        return DenseAccumulator([group], group.layout, passed, estimand.dtype)
    return DiagonalAccumulator(group, passed)


def _sent_back(estimand: Estimand, vectors: Iterator[Tensor]) -> Iterator[Tensor]:
    return vectors if estimand.passing is None else estimand.passing(vectors)


def _add_vectors(
    passed: ForwardPass,
    vectors: Iterator[Tensor],
    at_a_time: int,
    made: Mapping[str, Accumulator],
) -> None:
    """Add the estimator's vectors, from the outputs."""
    wanted = frozenset[int]().union(*(part.uses for part in made.values()))
    backward = Backward(passed.recording, passed.outputs, sorted(wanted))
    for piece in _pieces(vectors, at_a_time):
        copied = copied_gradients(passed, piece)
        for k, vector in enumerate(piece):
            one = {name: gradients[k : k + 1] for name, gradients in copied.items()}
            _add_vector(backward, vector, made, one)


def _add_cut(
    cut: Cut, roots: Iterator[Tensor], made: dict[str, Accumulator]
) -> dict[str, Accumulator]:
    """Add vectors from the head's input; the sums, with the head's own among them."""
    with without_autocast(cut.passed.device):
        made = cut.with_head(made)
    backward = None if cut.h is None else Backward(cut.passed.recording, cut.h, cut.below)
    for root in roots:  # none where nothing is below
        assert backward is not None
        _add_vector(backward, root, made, {})
    return made


def _add_vector(
    backward: Backward,
    vector: Tensor,
    made: Mapping[str, Accumulator],
    copied: Mapping[str, Tensor],
) -> None:
    """Backpropagate a vector and add what it contributes to each sum."""
    parts: dict[int, list[Accumulator]] = {}
    for part in made.values():
        for u in part.uses:
            parts.setdefault(u, []).append(part)

    def receive(u: int, rows: Tensor) -> None:
        for part in parts.get(u, ()):
            part.receive(u, rows)

    backward(vector, receive)
    with without_autocast(vector.device):
        for part in made.values():
            part.finish_vector(copied)


def _may_cut(estimand: Estimand) -> bool:
    """Whether all that is wanted of the head is its B, by the exact Λ."""
    return name_of(estimand.structure) == "kron" and type(estimand.fisher) is Exact


def vectors_at_once(passed: ForwardPass) -> int:
    """How many vectors to hold at a time, by the size of the copied gradients they yield."""
    copied = sum(
        group.layout.size for group in passed.knowledge.groups if group.name in passed.without_rules
    )
    f = passed.outputs
    return at_once(passed.n * copied + f.numel(), passed.budget.gradients(f))


def _pieces(vectors: Iterator[Tensor], length: int) -> Iterator[list[Tensor]]:
    """Lists of at most `length` vectors."""
    while piece := list(islice(vectors, length)):
        yield piece
