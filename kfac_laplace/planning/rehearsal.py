"""One batch of a fit on shapes alone, by the very code of a fit, counted part by part."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.blocks import Bases, Block, KroneckerBlock
from kfac_laplace.curvature.estimate.choice import choose_settings
from kfac_laplace.curvature.estimate.estimator import Estimand, estimate, vectors_at_once
from kfac_laplace.curvature.estimate.fisher import Exact, Hybrid, MonteCarlo
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.estimate.structures import Kron, LowRank
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network, learn_groups
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.curvature.recording.backward import Backward
from kfac_laplace.curvature.rows.row_layout import Axis
from kfac_laplace.likelihoods import Likelihood, aligned_target, settled_axis
from kfac_laplace.planning.counter import Count, Operations

#: Parts of the work on a batch: the forward pass; making vectors, which takes eigenvectors where
#: they begin at the head's input; their backward passes with the sums that their rows go into; sums
#: over inputs.
FORWARD, ROOTS, VECTORS, INPUTS = PARTS = ("forward", "roots", "vectors", "inputs")
#: What a first batch may do beside them.
LOOK = "look"
#: What comes after one that is not the first.
MERGE = "merge"
#: Vectors of which one costs what each of all does.
FEW = 2
#: Most vectors after which a low-rank structure has gone through all that it does.
CYCLE = 40


@dataclass(frozen=True)
class Scene:
    """What is rehearsed.

    Args:
        network: a model without numbers.
        ggn: options, and what is known of the real model.
        batch: inputs without numbers.
        y: targets.
        total: how many vectors there will be, where that is known already.
        looks: whether parts of the batch run again, as those of first batches do.
        moves: whether the model runs again to tell which rows are read.
        batches: how many such batches there are.
    """

    network: Network
    ggn: GGN
    batch: AnyBatch
    y: Tensor
    total: int | None = None
    looks: bool = True
    moves: bool = False
    batches: int = 1


@dataclass(frozen=True)
class Rehearsed:
    """What a batch showed.

    Args:
        operations: by part; of `VECTORS` those of one.
        peak: most bytes at one time, over the model, the batch and the blocks of earlier batches.
        first_peak: that of a first batch.
        knowledge: the groups.
        settings: expand or reduce.
        total: number of vectors; of Hybrid the most there can be, where nothing else is known.
        cut: whether vectors begin at the head's input.
        blocks: of the batch, without numbers.
        copied: whether some gradients come from copies of the parameters by example.
    """

    operations: Mapping[str, Operations]
    peak: int
    first_peak: int
    knowledge: Knowledge
    settings: Mapping[str, Setting]
    total: int
    cut: bool
    blocks: Mapping[str, Block]
    copied: bool


def rehearse(scene: Scene) -> Rehearsed:
    """Run one batch without numbers."""
    count, model = Count(), scene.network.model
    count.leave_out([*model.parameters(), *model.buffers(), *scene.batch.data, scene.y])
    with undisturbed(model), count.watching():
        count.enter(FORWARD)
        passed, y = _recorded(scene)
        options, settings = scene.ggn.options, scene.ggn.settings
        if not settings:
            settings = choose_settings(passed, options.kfac_approx, None)
        if scene.looks and isinstance(scene.batch, Batch):
            count.enter(LOOK)
            half = torch.arange((scene.batch.n + 1) // 2, device="cpu")
            with torch.no_grad():  # outputs of half the batch are compared
                passed.forward(scene.batch.select(half).x)
        passing = _Passing(count, scene, passed, y)
        blocks = estimate(passed, _estimand(scene, passed, settings, passing), y, Generator())
        known, copied = passed.knowledge, bool(passed.without_rules)
        total = passing.total if passing.passed else 0
        blocks = {name: _of_all(block, passing, total) for name, block in blocks.items()}
        del passed, passing._passed
        merging = _peak_of_merging(count, blocks) if scene.batches > 1 else 0
    operations = {part: count.of(part) for part in PARTS}
    operations[VECTORS] *= 1 / max(1, passing.passed)
    peak = max(merging, *(count.peaks.get(part, 0) for part in PARTS))
    first = max(peak, count.of_peak(LOOK))
    return Rehearsed(operations, peak, first, known, settings, total, passing.cut, blocks, copied)


class _Passing:
    """Lets a few vectors through, and tells the counter what is done."""

    def __init__(self, count: Count, scene: Scene, passed: ForwardPass, y: Tensor):
        self._count, self._scene, self._passed = count, scene, passed
        self.passed, self.cut, self.total = 0, False, _total(scene, passed, y)
        self._limit = min(_limit(scene, passed), self.total)

    def __call__(self, vectors: Iterator[Tensor]) -> Iterator[Tensor]:
        """The first few."""
        self._count.enter(ROOTS)
        held: Tensor | None = None
        for vector in islice(vectors, self._limit):
            self.cut = vector.ndim == 2
            if self.cut and self._scene.total is None:
                self.total = vector.shape[-1]
            if held is None and not self.cut:  # so many are made before the first goes back
                at_once = min(vectors_at_once(self._passed), self.total)
                held = vector.new_empty(max(0, at_once - 1), *vector.shape)
            self._count.enter(VECTORS)
            yield vector
            del vector
            self.passed += 1
            self._count.enter(ROOTS)
        del held
        if self._scene.moves and self._passed.seen.watches:
            self._count.enter(LOOK)
            self._look_again()
        self._count.enter(INPUTS)

    def _look_again(self) -> None:
        """A second pass, while the first is there."""
        known = self._passed.knowledge
        again = self._scene.network.record(self._scene.batch, known)
        used = sorted({u for uses in self._passed.uses.values() for u in uses})
        f = again.outputs
        Backward(again.recording, f, used)(torch.empty_like(f), lambda u, rows: None)


def _recorded(scene: Scene) -> tuple[ForwardPass, Tensor]:
    """The forward pass with class axis, weights of outputs and groups; aligned targets."""
    ggn, network = scene.ggn, scene.network
    passed = network.record(scene.batch, ggn.knowledge)
    known, output, likelihood = passed.knowledge, passed.recording.output, passed.likelihood
    axis = settled_axis(likelihood, output, scene.y, ggn.options.class_axis, known.axis)
    passed = passed.knowing(known.with_axis(axis, output.ndim))
    f = passed.output_rows.detach()
    y = passed.by_example(aligned_target(likelihood, scene.y, output.shape, f, axis))
    passed = passed.weighted(likelihood.importance(y))
    passed = passed.knowing(_with_likely_layouts(passed))
    if passed.knowledge.groups:
        return passed, y
    known = learn_groups(passed, ggn.options.subset_of_weights, ggn.options.joint_bias)
    if ggn.options.uncovered_stay_out:
        known = replace(known, groups=tuple(group for group in known.groups if group.covered))
    return passed.knowing(known), y


def _peak_of_merging(count: Count, blocks: Mapping[str, Block]) -> int:
    """Most bytes while blocks are added to those of earlier batches, which do not count."""
    before = count.live
    earlier = {
        name: block.with_tensors({key: one.clone() for key, one in block.tensors().items()})
        for name, block in blocks.items()
    }
    theirs = count.live - before
    count.enter(MERGE)
    merged = {name: block.absorb(earlier[name]) for name, block in blocks.items()}
    del merged
    return count.of_peak(MERGE) - theirs


def _of_all(block: Block, passing: _Passing, total: int) -> Block:
    """The block with as many rows as all vectors bring, where rows are kept."""
    sent = max(1, passing.passed)
    if not isinstance(block, KroneckerBlock) or not block.output_rows.numel() or total <= sent:
        return block
    if isinstance(block, LeadingBlock) and block.has_wide_output:
        return block
    b, k, o = block.output_rows.shape
    return replace(block, output_rows=block.output_rows.new_empty(b, k // sent * total, o))


def _with_likely_layouts(passed: ForwardPass) -> Knowledge:
    """Rows of uses that no real pass has shown: on the first axis that is as long as the batch."""
    layouts = dict(passed.knowledge.row_layouts)
    for u, use in enumerate(passed.recording.uses):
        lead = use.layer.inputs.lead
        if passed.key(u) not in layouts and not passed.batch.segments and passed.n in lead:
            layouts[passed.key(u)] = Axis(lead.index(passed.n))
    return replace(passed.knowledge, row_layouts=layouts)


def _estimand(
    scene: Scene, passed: ForwardPass, settings: Mapping[str, Setting], passing: _Passing
) -> Estimand:
    """What is wanted of a batch, of which a few vectors are sent back."""
    options = scene.ggn.options
    return Estimand(
        options.hessian_structure,
        settings,
        options.fisher if type(options.fisher) is Exact else _Blank(),
        SumDtype(options.factor_dtype),
        bases=_bases(passed) if options.hessian_structure == "ekfac" else {},
        passing=passing,
        foreseen=passing.total,
    )


@dataclass(frozen=True)
class _Blank:
    """Vectors without numbers, in place of those that are drawn or observed."""

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """As many as are wanted."""
        while True:
            yield torch.empty_like(f)


def _bases(passed: ForwardPass) -> dict[str, Bases]:
    """Eigenvectors without numbers."""
    found: dict[str, Bases] = {}
    for group in passed.knowledge.groups:
        if group.treatment == "kron":
            b, o, i = group.layout.matrix
            like = passed.outputs.detach().double()
            right = None if group.diagonal else like.new_empty(b, i, i)
            found[group.name] = like.new_empty(b, o, o), right
    return found


def _total(scene: Scene, passed: ForwardPass, y: Tensor) -> int:
    """How many vectors there are, or at most, unless they begin at the head's input."""
    f, fisher = passed.outputs.detach(), scene.ggn.options.fisher
    if scene.total is not None:
        return scene.total
    if type(fisher) is Exact:
        return fisher.count(passed.likelihood, f, y)
    if isinstance(fisher, Hybrid):
        most = Exact().count(passed.likelihood, f[:, :1], y[:, :1])
        return min(fisher.passes or most, most)
    return fisher.samples if isinstance(fisher, MonteCarlo) else 1


def _limit(scene: Scene, passed: ForwardPass) -> int:
    """How many vectors to send back: a low-rank structure compresses after some of them."""
    structure = scene.ggn.options.hessian_structure
    if isinstance(structure, LowRank | Kron):
        size = passed.knowledge.full_layout.size
        return min(CYCLE, 1 + 2 * min(structure.rank, size) // max(1, passed.n))
    return FEW
