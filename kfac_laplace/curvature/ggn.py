"""The GGN of a model over data, frozen: blocks, counts, and what it takes to read them.

All scaling happens here and in the blocks' normalisation: curvature is a raw sum over examples at
σ = 1 and T = 1. The likelihood scale 1/(σ²T) and the prior join in the posterior.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Bases, Block, KroneckerBlock
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.states.plain import same


def _nothing() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class GGN:
    """Σ_n J_nᵀ Λ_n J_n over some data [KFAC23], and the sums that the evidence wants beside it.

    Args:
        options: what was asked for.
        knowledge: groups of parameters, and how their rows lie in batches.
        settings: expand or reduce, by name of the groups with Kronecker factors.
        blocks: raw sums at σ = 1 and T = 1, by group, or one "full" or "lowrank"; empty without
            data.
        statistic: the likelihood's sum over the data.
        n_data: number of examples.
        n_rows: number of output rows, nodes where these have outputs of their own.
        n_outputs: number of scalar outputs.
        targets: what is known of the targets without any network, `Likelihood.target_sums`.
        bases: eigenvectors of Kronecker factors by group, in which "ekfac" takes the diagonal;
            empty before any data were read, and under other structures.
    """

    options: CurvatureOptions
    knowledge: Knowledge
    settings: Mapping[str, Setting] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)
    statistic: Tensor = field(default_factory=_nothing)
    n_data: float = 0
    n_rows: float = 0
    n_outputs: float = 0
    targets: Tensor = field(default_factory=_none)
    bases: Mapping[str, Bases] = field(default_factory=dict)

    @property
    def likelihood(self) -> Likelihood:
        """p(y | f)."""
        return self.options.likelihood

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups of parameters that share a block, in model order."""
        return self.knowledge.groups

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters inside the posterior, in model order."""
        return self.knowledge.params

    def without_data(self) -> "GGN":
        """The GGN of no data, with the groups, settings and bases that are known."""
        knowledge = replace(self.knowledge, effective=frozenset())
        return GGN(self.options, knowledge, self.settings, bases=self.bases)

    def eigenbases(self) -> dict[str, Bases]:
        """Eigenvectors of the Kronecker factors, by group."""
        return {
            name: block.bases()
            for name, block in self.blocks.items()
            if isinstance(block, KroneckerBlock)
        }

    def scaled(self, weight: float) -> "GGN":
        """The GGN with every example counted `weight` times.

        Raises:
            InvalidValue: a weight that is negative or not finite.
        """
        if not 0 <= weight < math.inf:
            raise InvalidValue("a weight is finite and ≥ 0", where="weight", got=weight)
        return replace(
            self,
            blocks={name: block.scaled(weight) for name, block in self.blocks.items()},
            statistic=weight * self.statistic,
            n_data=weight * self.n_data,
            n_rows=weight * self.n_rows,
            n_outputs=weight * self.n_outputs,
            targets=self.likelihood.scaled_sums(self.targets, weight),
        )

    def __add__(self, other: "GGN") -> "GGN":
        """The GGN of both data sets.

        A moving average with decay ρ is `old.scaled(ρ) + new`, whose `n_data` is its weight.

        Raises:
            InvalidValue: the two have other structures, likelihoods, blocks or settings, or their
                classes on different axes.
        """
        if not same(self.options.binding, other.options.binding):
            raise InvalidValue(
                "the two have different structures or likelihoods",
                where="merge",
                got=f"'{other.options.hessian_structure}' into '{self.options.hessian_structure}'",
                remedy="Use the same options for both",
            )
        axes = {self.knowledge.axis, other.knowledge.axis} - {None}
        if len(axes) > 1:
            raise InvalidValue(
                "the two have their classes on different axes of the output",
                where="merge",
                got=f"{other.knowledge.axis} into {self.knowledge.axis}",
                remedy="Give both the same class_axis",
            )
        theirs = other.blocks_like(self)
        if not self.blocks:
            known = other.knowledge.with_rows_of(self.knowledge)
            return replace(other, options=self.options, knowledge=known, blocks=theirs)
        if not other.blocks:
            return replace(self, knowledge=self.knowledge.with_rows_of(other.knowledge))
        if not same(self._signature(), other._signature()):
            raise InvalidValue(
                "the two were computed with different blocks or settings",
                where="merge",
                remedy="Use the same model and options for both",
            )
        if not same(self.bases, other.bases):
            raise InvalidValue(
                "the two have diagonals in different eigenbases, each that of its own data",
                where="merge",
                got="hessian_structure='ekfac'",
                remedy="Begin both from one: other = curvature.empty(); other.fit(loader)",
            )
        return self.joined({n: b + theirs[n] for n, b in self.blocks.items()}, other)

    def after(self, earlier: "GGN") -> "GGN":
        """This batch's and what came before, summed into this one's own tensors."""
        blocks = {
            name: block.absorb(earlier.blocks[name]) if earlier.blocks else block
            for name, block in self.blocks.items()
        }
        return self.joined(blocks, earlier)

    def blocks_like(self, other: "GGN") -> Mapping[str, Block]:
        """The blocks where those of another lie, whose `offload` may not be the same."""
        if self.options.offload == other.options.offload:
            return self.blocks
        device = self.statistic.device
        home = other.options.home(device)
        return {name: block.placed(device, home) for name, block in self.blocks.items()}

    def with_blocks(self, blocks: Mapping[str, Block]) -> "GGN":
        """The same counts with other blocks."""
        return replace(self, blocks=blocks)

    def joined(self, blocks: Mapping[str, Block], other: "GGN") -> "GGN":
        """The counts of both, and what both know, with blocks that are those of both already."""
        return replace(
            self,
            knowledge=self.knowledge.with_rows_of(other.knowledge),
            blocks=blocks,
            statistic=self.statistic + other.statistic.to(self.statistic.device),
            n_data=self.n_data + other.n_data,
            n_rows=self.n_rows + other.n_rows,
            n_outputs=self.n_outputs + other.n_outputs,
            targets=self._summed(self.targets, other.targets.to(self.targets.device)),
        )

    def _summed(self, one: Tensor, other: Tensor) -> Tensor:
        """Sums over the targets of both, by output where these are the same ones."""
        if not one.numel() or not other.numel():
            return one if one.numel() else other
        joins = self.likelihood
        if one.shape != other.shape:
            one, other = joins.pooled_sums(one), joins.pooled_sums(other)
        return joins.joined_sums(one, other)

    def _signature(self) -> tuple[object, ...]:
        """What two must share to be added."""
        layouts = {name: (type(block), block.layout) for name, block in self.blocks.items()}
        return layouts, dict(self.settings), self.options.fisher
