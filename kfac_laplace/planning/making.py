"""Puts a plan together: passes counted and timed, decompositions, bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.blocks import Bases
from kfac_laplace.curvature.model.tensors import tensors_in
from kfac_laplace.errors import InvalidValue
from kfac_laplace.planning.counter import Operations
from kfac_laplace.planning.decompositions import (
    CHOLESKY,
    EIGENVALUES,
    EIGENVECTORS,
    Decompositions,
    decompositions,
)
from kfac_laplace.planning.held import late_products
from kfac_laplace.planning.plan import Memory, Part, Plan
from kfac_laplace.planning.rehearsal import FORWARD, INPUTS, ROOTS, VECTORS
from kfac_laplace.planning.stages import Data, Learned, Stage, learn, stage
from kfac_laplace.planning.timing import Seconds, eigen_seconds, gram_rate, product_rate


@dataclass(frozen=True)
class Pace:
    """How long work takes: by a rate, or as it was measured where there is none.

    Args:
        device: where.
        rate: operations a second in float32.
    """

    device: torch.device
    rate: float | None

    def eigen(self, found: Decompositions, vectors: bool) -> float:
        """Seconds for eigenvalues, or for eigenvectors, of all sides."""
        sides = found.bases if vectors else found.eigen
        completing = found.completing if vectors else 0
        if self.rate is not None:
            cubes = sum(side.cubes for side in sides)
            eigen = (EIGENVECTORS if vectors else EIGENVALUES) * cubes
            return 2 * (eigen + completing) / self.rate
        sizes = {side.size for side in sides}
        each = eigen_seconds(sizes, self.device, vectors)
        seconds = sum(side.count * each[side.size] for side in sides)
        if completing:
            seconds += completing / product_rate(self.device, torch.float64)
        return seconds

    def cholesky(self, found: Decompositions) -> float:
        """Seconds for the factors."""
        if not found.cholesky:
            return 0.0
        rate = self.rate or 2 * product_rate(self.device, torch.float64)
        return 2 * CHOLESKY * sum(side.cubes for side in found.cholesky) / rate


def make_plan(
    curvature: Curvature, x: Any, y: Tensor, n_data: int | None, rate: float | None
) -> Plan:
    """What a fit of a curvature over n_data examples takes, by one batch.

    Args:
        curvature: of no data; it is not changed.
        x: inputs of the batch.
        y: its targets.
        n_data: examples of the fit; the batch's by default.
        rate: operations a second in float32; None: measured.
    """
    network, ggn = curvature.network, curvature.ggn
    on_meta = network.device.type == "meta"
    if not on_meta and (y.is_meta or any(tensor.is_meta for tensor in tensors_in(x))):
        raise InvalidValue(
            "a batch without numbers for a model with them",
            where="x",
            got="tensors on the meta device",
            remedy="Give a real batch, or make the model under torch.device('meta') as well",
        )
    batch = network.batch(x, len(y) if y.ndim else None, ggn.knowledge.interface)
    data = Data(batch, y, ceil((n_data or batch.n) / batch.n))
    stages, bases = _stages(curvature, data, on_meta)
    said = ""
    if on_meta and rate is None:
        rate = product_rate(torch.device("cpu"), torch.float32)
        said = f"at {rate:.3g} operations a second, as a product of two matrices makes here"
    elif rate is not None:
        said = f"at {rate:.3g} operations a second, as given"
    pace = Pace(network.device, rate)
    parts: list[Part] = []
    for k, one in enumerate(stages):
        if rate is None:
            seconds, m = one.seconds(curvature.generator, bases if k else {})
            said = f"measured, each part on {m} of {batch.n} examples"
        else:
            seconds = _at_rate(one, rate)
        parts += _parts(one, seconds, pace, last=k == len(stages) - 1)
        if k < len(stages) - 1:
            parts.append(_eigenbases(one, pace))
    return _plan(curvature, data, n_data or batch.n, stages, parts, pace, said)


def _stages(
    curvature: Curvature, data: Data, on_meta: bool
) -> tuple[list[Stage], Mapping[str, Bases]]:
    """The passes of a fit: one, or two where the first finds eigenbases; and these."""
    network, start = curvature.network, curvature.ggn
    structures = [start.options.hessian_structure]
    if structures == ["ekfac"]:
        structures = ["kron", "ekfac"]
    made: list[Stage] = []
    bases: Mapping[str, Bases] = {}
    learned: Learned | None = None
    for structure in structures:
        own = replace(start, options=replace(start.options, hessian_structure=structure))
        if made:
            before = made[-1].rehearsed
            own = replace(own, knowledge=before.knowledge, settings=before.settings)
        if not on_meta:
            if learned is not None:
                bases = learned.ggn.eigenbases()
                known = learned.ggn
                own = replace(own, knowledge=known.knowledge, settings=known.settings, bases=bases)
            learned = learn(network, own, data, curvature.generator)
        made.append(stage(network, own, learned, data))
    return made, bases


def _at_rate(one: Stage, rate: float) -> Seconds:
    """Seconds of a batch by its operations."""
    of = one.rehearsed.operations
    return Seconds(
        of[FORWARD].work / rate,
        of[ROOTS].work / rate,
        of[VECTORS].work / rate,
        of[INPUTS].work / rate,
        one.of_first.work / rate,
    )


def _parts(one: Stage, seconds: Seconds, pace: Pace, last: bool) -> list[Part]:
    """What a pass over the data does."""
    of, n = one.operations, one.data.batches
    late = Operations(0.0, late_products(one.rehearsed.blocks, n))
    inputs = of[INPUTS]
    name = "" if last else " for eigenbases"
    made = [
        Part(f"forward{name}", n, n * of[FORWARD].total, n * seconds.forward),
        Part(
            f"backward and B{name}",
            n * one.vectors,
            n * of[VECTORS].total,
            n * one.vectors * seconds.vector,
        ),
        Part(f"sums over inputs{name}", n, n * inputs.total, n * seconds.rest),
    ]
    if of[ROOTS].total:
        made.insert(1, Part(f"roots{name}", n, n * of[ROOTS].total, n * seconds.roots))
    if late.total:
        took = late.work / (pace.rate or 2 * gram_rate(pace.device))
        made.append(Part(f"products of kept rows{name}", 1, late.total, took))
    if seconds.first:
        made.append(Part("checks of the first batch", 1, one.of_first.total, seconds.first))
    return made


def _eigenbases(one: Stage, pace: Pace) -> Part:
    """Between the two passes."""
    known, batches = one.rehearsed.knowledge, one.data.batches
    found = decompositions(known.groups, "kron", one.rehearsed.blocks, batches)
    return Part("eigenbases", 1, found.operations_of_bases, pace.eigen(found, vectors=True))


def _plan(
    curvature: Curvature,
    data: Data,
    n_data: int,
    stages: list[Stage],
    parts: list[Part],
    pace: Pace,
    said: str,
) -> Plan:
    last, options = stages[-1], curvature.options
    knowledge = last.rehearsed.knowledge
    found = decompositions(
        knowledge.groups, options.hessian_structure, last.rehearsed.blocks, data.batches
    )
    log_det = Part(
        "first log-determinant",
        1,
        found.operations,
        pace.eigen(found, vectors=False) + pace.cholesky(found),
    )
    bases = Part(
        "first prediction, beside it",
        1,
        found.operations_of_bases,
        pace.eigen(found, vectors=True),
    )
    count = sum(group.block_layout.size for group in knowledge.groups)
    return Plan(
        head=f"Plan({type(options.likelihood).__name__}, {options.structure}, {count} parameters)",
        n_data=n_data,
        examples=data.batch.n,
        batches=data.batches,
        forwards=data.batches * len(stages),
        vectors=sum(one.vectors for one in stages),
        backwards=data.batches * sum(one.vectors for one in stages),
        parts=tuple(parts),
        later=(log_det, *([bases] if found.bases else [])),
        memory=Memory(
            peak=max(one.peak for one in stages),
            factors=last.held.end,
            decompositions=found.bytes,
            bases=found.bytes_of_bases,
        ),
        rate=said,
        notes=_notes(stages),
    )


def _notes(stages: list[Stage]) -> tuple[str, ...]:
    """What the numbers leave open."""
    found = []
    if any(one.counted_on == "numbers" for one in stages):
        found.append(
            "The model does not run on shapes alone: operations and bytes are counted on the batch."
        )
    if any(one.learned is None for one in stages):
        found.append(
            "Without numbers: rows are taken to lie on the axis that is as long as the batch, "
            "layers to keep what 'auto' is by shapes, and every position to count."
        )
    if any(one.rehearsed.cut for one in stages):
        found.append("Vectors begin at the input of the last layer, which has fewer entries.")
    return tuple(found)
