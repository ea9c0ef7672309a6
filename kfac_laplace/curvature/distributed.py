"""Curvature of data that lie with several processes: sums over ranks, to the same bits on each.

Curvature of a data set is a sum over its examples. Each rank sums those of its own part; then raw
sums and counts are added up, symmetric matrices in packed storage.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.accumulate import with_batch
from kfac_laplace.curvature.agreement import Opening, other_ranks_went_on, settled
from kfac_laplace.curvature.checkpoint import Keeping, Phase
from kfac_laplace.curvature.estimate.blocks import Bases, Block, KroneckerBlock
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
from kfac_laplace.curvature.estimate.low_rank import LowRankBlock
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.curvature.same_fit import Counting
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import same

log = logging.getLogger("kfac_laplace")

#: What tensors of zeros are made of: dtypes and shapes, by name.
Forms = Mapping[str, tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True)
class Source:
    """One rank's batches.

    Args:
        batches: inputs and targets; those that were not counted before an interruption.
        kept: knows what was counted then, and writes what is counted; None: nothing is kept.
        phase: which pass over the data it is.
    """

    batches: Iterator[tuple[Any, Tensor]]
    kept: Keeping | None = None
    phase: Phase = "own"

    def begin(self, own: Counting) -> int:
        """Put what was counted before into `own`; how many batches that are."""
        return 0 if self.kept is None else self.kept.begin(self.phase, own)

    def end(self) -> None:
        """Write what was counted."""
        if self.kept is not None:
            self.kept.end_part()


@dataclass
class Own:
    """What counts one rank's part; attributes as those of `Curvature`."""

    ggn: GGN
    generator: Generator
    options: CurvatureOptions
    network: Network

    def add(self, batch: tuple[Any, Tensor], parameters: Mapping[str, Tensor] | None) -> None:
        """Add a batch."""
        self.ggn = with_batch(self.ggn, self.network, batch, self.generator, parameters)


def read_parts(
    ranks: Ranks,
    of: Counting,
    source: Source,
    begun: Callable[[GGN], object],
    parameters: Mapping[str, Tensor] | None = None,
) -> GGN:
    """The GGN of earlier data and of what all ranks read; the same bits on each.

    Args:
        ranks: the processes, all of which come here.
        of: earlier data, model and source of labels and signs, the same on all; of the source each
            rank takes a seed of its own.
        source: this rank's batches, which may be none.
        begun: called with the GGN of the first batch, or of none; what it raises ends the pass.
        parameters: weights at which to take the curvature; the model's own by default.

    Raises:
        OtherRankFailed: another rank raised, where this one did not.
        InvalidValue: no rank has data, or they do not agree on what is to be added.
    """
    before = of.ggn
    seed = int(torch.randint(2**62, (), generator=of.generator, device="cpu")) + ranks.rank
    draws = Generator().manual_seed(seed)
    own, first = Own(before.without_data(), draws, of.options, of.network), None
    sums: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, tuple[type[Block], Layout]] = {}

    def open_() -> Opening:
        nonlocal first
        if not source.begin(own):
            first = next(source.batches, None)
            if first is not None:
                own.add(first, parameters)
        return Opening.of(own.ggn, before, of.network.model, first)

    def go_on() -> Part:
        if agreed is not None:
            if first is None and own.ggn.blocks:
                raise other_ranks_went_on()
            own.ggn = agreed
            if first is not None:
                own.add(first, parameters)
        begun(own.ggn)
        for batch in source.batches:
            own.add(batch, parameters)
        source.end()
        blocks, own.ggn = dict(own.ggn.blocks), own.ggn.with_blocks({})
        for name in [*blocks]:  # one by one, so that they are held twice for none but one
            kinds[name] = type(blocks[name]), blocks[name].layout
            sums[name] = blocks.pop(name).sums()
        return Part.of(own.ggn, kinds, sums)

    agreed = settled(ranks.gathered(open_), own.ggn)
    parts = ranks.gathered(go_on)
    return before + summed(ranks, own.ggn, parts, sums, of.network.device)


# --- what is added -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a rank tells the others of its part: all but the entries of its curvature.

    Args:
        knowledge: groups, and how rows lie.
        blocks: kind, layout and sums of each block; empty without data.
        statistic: the likelihood's sum.
        counts: examples, rows and outputs.
        targets: what is known of the targets alone.
    """

    knowledge: Knowledge
    blocks: Mapping[str, tuple[type[Block], Layout, Forms]]
    statistic: Tensor
    counts: tuple[float, float, float]
    targets: Tensor

    @classmethod
    def of(
        cls,
        ggn: GGN,
        kinds: Mapping[str, tuple[type[Block], Layout]],
        sums: Mapping[str, Mapping[str, Tensor]],
    ) -> "Part":
        """What there is to tell of a part: its GGN without blocks, their kinds, and their sums."""
        blocks = {name: (*kinds[name], _forms(own)) for name, own in sums.items()}
        counts = ggn.n_data, ggn.n_rows, ggn.n_outputs
        return cls(ggn.knowledge, blocks, ggn.statistic.cpu(), counts, ggn.targets.cpu())

    def counted(self, own: GGN, device: torch.device) -> GGN:
        """As a GGN without blocks, on a device, with the options and bases of one's own."""
        return GGN(
            own.options,
            self.knowledge,
            own.settings,
            {},
            self.statistic.to(device),
            *self.counts,
            targets=self.targets.to(device),
            bases=own.bases,
        )


def summed(
    ranks: Ranks,
    own: GGN,
    parts: Sequence[Part],
    sums: dict[str, dict[str, Tensor]],
    device: torch.device,
) -> GGN:
    """The GGN of all ranks' data; every rank has to call it, and gets the same bits.

    Args:
        ranks: the processes.
        own: the GGN of this rank's part.
        parts: what each rank tells.
        sums: this rank's by block, which are taken over; none without data.
        device: of the model here; a GGN of no data does not tell.

    Raises:
        InvalidValue: the ranks have blocks of different shapes.
    """
    filled = [(rank, part) for rank, part in enumerate(parts) if part.blocks]
    counted = reduce(
        lambda one, other: one.joined({}, other),
        (part.counted(own, device) for _, part in filled),
    )
    (start, first), *others = filled
    for rank, other in others:
        if not same(_added(first.blocks), _added(other.blocks)):
            raise _different_blocks((start, first), (rank, other))
    home = own.options.home(device)
    added = {name: one for name, one in first.blocks.items() if one[0].additive}
    for name, (_, _, forms) in added.items():
        if name not in sums:
            sums[name] = _zeros(forms, home or device)
    sent = ranks.add_([tensor for name in added for tensor in sums[name].values()], device)
    log.debug("curvature of %d ranks: %d bytes of sums", ranks.size, sent)
    blocks: dict[str, Block] = {}
    for name, (kind, layout, _) in first.blocks.items():
        if name in added:
            block = kind.from_sums(layout, sums[name], own.bases.get(name))
        else:
            assert own.options.rank is not None
            block = _leading(ranks, name, parts, sums, own.options.rank, device)
        blocks[name] = block if home is None else block.placed(device, home)
    return counted.with_blocks(blocks)


def _added(
    blocks: Mapping[str, tuple[type[Block], Layout, Forms]],
) -> dict[str, tuple[type[Block], Layout, Forms | None]]:
    """The same without shapes where sums are not added: each rank has directions of its own."""
    return {
        name: (kind, layout, forms if kind.additive else None)
        for name, (kind, layout, forms) in blocks.items()
    }


def _leading(
    ranks: Ranks,
    name: str,
    parts: Sequence[Part],
    sums: Mapping[str, Mapping[str, Tensor]],
    rank: int,
    device: torch.device,
) -> Block:
    """A block of leading directions of all ranks' rows, which do not add entry by entry."""
    total: Block | None = None
    for source, part in enumerate(parts):
        if name not in part.blocks:
            continue
        kind, layout, forms = part.blocks[name]
        assert issubclass(kind, LowRankBlock | LeadingBlock)
        mine = sums[name] if source == ranks.rank else _zeros(forms, device)
        tensors = {n: ranks.sent(tensor.to(device), source) for n, tensor in mine.items()}
        block: Block = kind.from_tensors(layout, tensors, rank)
        total = block if total is None else total + block
    assert total is not None
    return total


def _different_blocks(first: tuple[int, Part], other: tuple[int, Part]) -> InvalidValue:
    (a, one), (b, two) = first, other
    names = [*one.blocks, *(name for name in two.blocks if name not in one.blocks)]
    return InvalidValue(
        f"ranks {a} and {b} have different blocks",
        where="process_group",
        got=next(n for n in names if not same(one.blocks.get(n), two.blocks.get(n))),
        remedy="Give all ranks the same model, and batches that use the same parameters",
    )


def _forms(tensors: Mapping[str, Tensor]) -> Forms:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _zeros(forms: Forms, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in forms.items()
    }


# --- decompositions ------------------------------------------------------------------------------


def eigenbases(ranks: Ranks, ggn: GGN) -> dict[str, Bases]:
    """Eigenvectors of the Kronecker factors by group, each computed on one rank."""
    blocks, device = _kronecker(ggn), ggn.statistic.device
    made = ranks.shared_out(
        [partial(_bases, block) for block in blocks.values()],
        [_cost(block) for block in blocks.values()],
        device,
        ggn.options.home(device),
    )
    return {
        name: (own[0], own[1] if len(own) > 1 else None)
        for name, own in zip(blocks, made, strict=True)
    }


def decomposed(ranks: Ranks, ggn: GGN) -> GGN:
    """The same with the eigenvalues of its Kronecker factors, each computed on one rank.

    Eigenvectors, which are many more numbers, each rank computes for itself when they are wanted.
    """
    blocks = _kronecker(ggn)
    made = ranks.shared_out(
        [partial(_sides, block) for block in blocks.values()],
        [_cost(block) for block in blocks.values()],
        ggn.statistic.device,
    )
    known = {
        name: block.with_sides(own[0], own[1])
        for (name, block), own in zip(blocks.items(), made, strict=True)
    }
    return ggn.with_blocks({**ggn.blocks, **known})


def _kronecker(ggn: GGN) -> dict[str, KroneckerBlock]:
    return {n: block for n, block in ggn.blocks.items() if isinstance(block, KroneckerBlock)}


def _bases(block: KroneckerBlock) -> list[Tensor]:
    return [basis for basis in block.bases() if basis is not None]


def _sides(block: KroneckerBlock) -> list[Tensor]:
    return [*block.sides]


def _cost(block: KroneckerBlock) -> float:
    """What its decomposition costs, beside those of others."""
    b, o, i = block.layout.matrix
    if isinstance(block, LeadingBlock):  # by inner products of few rows
        k = block.rank
        o, i = (k if block.has_wide_output else o), (k if block.has_wide_input else i)
    return b * (o**3 + (i if block.has_diagonal_input else i**3))
