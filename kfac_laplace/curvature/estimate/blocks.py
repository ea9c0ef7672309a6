"""Blocks of the GGN as raw sums over examples at σ = 1, T = 1. Blocks of data sets add with `+`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.curvature.linalg.spectrum import (
    Rotation,
    Spectrum,
    eigenbasis,
    eigenvalues_of_diagonal,
)
from kfac_laplace.curvature.rows.layout import Layout

#: Eigenvectors of B (b, o, o) and of A (b, i, i), as columns; None for a diagonal A.
Bases = tuple[Tensor, Tensor | None]


def own_copy(tensor: Tensor) -> Tensor:
    """A copy whose entries lie one after another, whatever the order in memory was."""
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Block(ABC):
    """The GGN of one group of parameters, summed over examples.

    Args:
        layout: how the parameters lie in the block.
    """

    layout: Layout
    kind: ClassVar[str]
    #: whether blocks of two data sets add entry by entry
    additive: ClassVar[bool] = True

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters, in the order in which `dense` flattens them."""
        return self.layout.params

    @property
    def name(self) -> str:
        """First parameter, for messages."""
        return self.params[0]

    @property
    @abstractmethod
    def factors(self) -> Any:
        """The stored factors."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The block as a matrix (p, p), parameters flattened one after another."""

    @property
    @abstractmethod
    def spectrum(self) -> Spectrum:
        """Rotation and eigenvalues, float64."""

    def eigenvalues(self) -> Tensor:
        """All p eigenvalues in ascending order, float64."""
        return self.spectrum.values.flatten().sort().values

    def tensors(self) -> dict[str, Tensor]:
        """The raw sums by field name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    def __add__(self, other: Self) -> Self:
        """The block of the two data sets together."""
        mine, theirs = self.tensors(), other.tensors()
        return self.with_tensors({name: mine[name] + theirs[name] for name in mine})

    def scaled(self, weight: float) -> Self:
        """The block times a weight ≥ 0, as moving averages want it."""
        return self.with_tensors({name: weight * one for name, one in self.tensors().items()})

    def zero(self) -> Self:
        """The block of no data."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()}
        return self.with_tensors(zeros)

    def absorb(self, other: Self) -> Self:
        """Add another block into this one's own tensors, which nobody else may hold."""
        theirs = other.tensors()
        for name, tensor in self.tensors().items():
            tensor.add_(theirs[name])
        return self

    def sums(self) -> dict[str, Tensor]:
        """What adds entry by entry over data sets, in tensors of their own, entries in order."""
        return {name: own_copy(tensor) for name, tensor in self.tensors().items()}

    @classmethod
    def from_sums(cls, layout: Layout, sums: Mapping[str, Tensor], bases: Bases | None) -> Self:
        """Rebuild a block from `sums()`, which it takes over.

        Args:
            layout: how the parameters lie in it.
            sums: by name.
            bases: eigenvectors of the factors, of blocks that are in their basis.
        """
        return cls.from_tensors(layout, sums)

    @classmethod
    def from_tensors(cls, layout: Layout, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a block from `tensors()`."""
        return cls(layout, **tensors)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The block of the same parameters with other raw sums."""
        return self.from_tensors(self.layout, tensors)

    def placed(self, device: torch.device, home: torch.device | None) -> Self:
        """The block for a model on a device, with its large tensors elsewhere.

        Args:
            device: where decompositions and products of it are to be made.
            home: where it lies between them; None: there as well.
        """
        there = home or device
        return self.with_tensors({name: one.to(there) for name, one in self.tensors().items()})


class KroneckerFactors(NamedTuple):
    """A (b, i, i), normalised by its count, and B (b, o, o), a sum: the block is B ⊗ A.

    Of a diagonal A, as embeddings have it, only the diagonal (b, i) is stored.
    """

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class KroneckerBlock(Block):
    """B ⊗ A for each of b blocks [KFAC23, eqs. for K-FAC-expand and K-FAC-reduce].

    Sums and rows together are what `Gram` describes. They may lie in another memory than counts do,
    which are where they are decomposed and multiplied.

    Args:
        input_sum: Σ a aᵀ over the input rows (expand) or their means by example (reduce), or the
            diagonal (b, i) of it.
        input_rows: rows that are not yet in that sum.
        input_count: number of all such rows in each of the b blocks.
        output_sum: B = Σ b Λ bᵀ, over rows (expand) or their sums by example (reduce).
        output_rows: rows that are not yet in that sum.
    """

    input_sum: Tensor
    input_rows: Tensor
    input_count: Tensor
    output_sum: Tensor
    output_rows: Tensor
    kind: ClassVar[str] = "kron"

    @classmethod
    def of(cls, layout: Layout, inputs: Gram | Tensor, count: Tensor, outputs: Gram) -> Self:
        """The block of two Gram matrices, or of a diagonal (b, i) and one."""
        if isinstance(inputs, Tensor):
            inputs = Gram(inputs, inputs[:, None, :][:, :0])
        return cls(layout, inputs.packed, inputs.rows, count, outputs.packed, outputs.rows)

    @property
    def device(self) -> torch.device:
        """Where its decompositions and products are made."""
        return self.input_count.device

    @property
    def home(self) -> torch.device:
        """Where its sums lie."""
        return self.output_sum.device

    def placed(self, device: torch.device, home: torch.device | None) -> Self:
        """With sums of products, made there, at home, and counts on the device."""
        if home is None or home == device:
            return super().placed(device, None)
        inputs = self.input_sum if self.has_diagonal_input else self.inputs.as_sums()
        outputs, count = self.outputs.as_sums().to(home), self.input_count.to(device)
        return self.with_factors(inputs.to(home), count, outputs)

    @property
    def inputs(self) -> Gram:
        """Σ a aᵀ, where it is no diagonal."""
        return Gram(self.input_sum, self.input_rows)

    @property
    def outputs(self) -> Gram:
        """B."""
        return Gram(self.output_sum, self.output_rows)

    def __add__(self, other: Self) -> Self:
        """The block of the two data sets together."""
        own = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return self.with_tensors(own).absorb(other)

    def scaled(self, weight: float) -> Self:
        """B times a weight; A keeps its value, and counts that much less in averages."""
        return replace(
            self,
            input_sum=weight * self.input_sum,
            input_rows=weight**0.5 * self.input_rows,
            input_count=weight * self.input_count,
            output_sum=weight * self.output_sum,
            output_rows=weight**0.5 * self.output_rows,
        )

    def with_factors(self, inputs: Gram | Tensor, count: Tensor, outputs: Gram) -> Self:
        """A block of the same parameters with other factors; arguments as for `of`."""
        return self.of(self.layout, inputs, count, outputs)

    def with_outputs(self, matrices: Tensor) -> Self:
        """The block with another B (b, o, o)."""
        outputs = Gram.of(matrices)
        return replace(self, output_sum=outputs.packed, output_rows=outputs.rows)

    def with_loss_scaled(self, weight: float | Tensor) -> Self:
        """The block of `weight` times the loss: B alone depends on it. One weight, or (b,)."""
        weights = torch.as_tensor(weight).to(self.output_sum).reshape(-1, 1, 1)
        rows = self.output_rows * weights.sqrt().to(self.output_rows.dtype)
        return replace(self, output_sum=weights * self.output_sum, output_rows=rows)

    def with_inputs_scaled(self, weights: Tensor) -> Self:
        """A of each of the b blocks times a weight (b,)."""
        weights = weights.to(self.input_sum.dtype)
        sums = self.input_sum * weights.reshape(-1, *[1] * (self.input_sum.ndim - 1))
        rows = self.input_rows * weights.sqrt().to(self.input_rows.dtype)[:, None, None]
        return replace(self, input_sum=sums, input_rows=rows)

    def traces(self) -> tuple[Tensor, Tensor]:
        """Σ |a|², A's trace times its count, and B's trace, each (b,)."""
        diagonal = self.has_diagonal_input
        inputs = self.input_sum.sum(-1) if diagonal else self.inputs.traces()
        return inputs.to(self.device), self.outputs.traces().to(self.device)

    def absorb(self, other: Self) -> Self:
        """Add another block into this one's own sums, which nobody else may hold."""
        if self.has_diagonal_input:
            inputs: Gram | Tensor = self.input_sum.add_(other.input_sum)
        else:
            inputs = self.inputs.absorb(other.inputs)
        count = self.input_count + other.input_count
        return self.with_factors(inputs, count, self.outputs.absorb(other.outputs))

    def compact(self) -> Self:
        """The same in what takes least memory, to be kept and added to for long."""
        inputs = self.input_sum if self.has_diagonal_input else self.inputs.compact()
        outputs = self.outputs.compact()
        return self.with_factors(inputs, self.input_count, outputs)

    def sums(self) -> dict[str, Tensor]:
        """Σ a aᵀ and B, packed, or the diagonal of the first; and the count."""
        diagonal = self.has_diagonal_input
        return {
            "input": own_copy(self.input_sum) if diagonal else self.inputs.summed(),
            "count": own_copy(self.input_count),
            "output": self.outputs.summed(),
        }

    @classmethod
    def from_sums(cls, layout: Layout, sums: Mapping[str, Tensor], bases: Bases | None) -> Self:
        """Rebuild a block from `sums()`."""
        b, o, i = layout.matrix
        packed, outputs = sums["input"], sums["output"]
        inputs = packed if packed.ndim == 2 else Gram(packed, packed.new_empty(b, 0, i))
        return cls.of(layout, inputs, sums["count"], Gram(outputs, outputs.new_empty(b, 0, o)))

    @property
    def factors(self) -> KroneckerFactors:
        """A = Σ a aᵀ / count and B."""
        if self.has_diagonal_input:
            inputs = self.input_sum.to(self.device)
        else:
            inputs = self.inputs.to(self.device).matrices()
        count = self._divisor.reshape(-1, *[1] * (inputs.ndim - 1))
        outputs = self.outputs.to(self.device).matrices()
        return KroneckerFactors(inputs / count.to(inputs.dtype), outputs)

    @property
    def _divisor(self) -> Tensor:
        """The counts, and 1 where nothing was counted."""
        return self.input_count.where(self.input_count > 0, 1)

    @property
    def has_diagonal_input(self) -> bool:
        """Whether only the diagonal of A is stored."""
        return self.input_sum.ndim == 2

    def dense(self) -> Tensor:
        """Block-diagonal over b of B ⊗ A, in parameter order."""
        a, b = self.factors
        a = a.diag_embed() if self.has_diagonal_input else a
        blocks = [torch.kron(right, left) for left, right in zip(a, b, strict=True)]
        order = self.layout.order.to(a.device)
        return torch.block_diag(*blocks)[order[:, None], order]

    @cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues μ (b, o) of B and λ (b, i) of A, float64."""
        with torch.inference_mode(False):  # kept, so of use outside inference mode as well
            count = self._divisor.double()[:, None]
            mu = self.outputs.to(self.device).eigenvalues(self.name)
            if self.has_diagonal_input:
                diagonal = self.input_sum.to(self.device)
                return mu, eigenvalues_of_diagonal(diagonal, self.name) / count
            return mu, self.inputs.to(self.device).eigenvalues(self.name) / count

    def with_sides(self, mu: Tensor, lam: Tensor) -> Self:
        """The same, whose eigenvalues another process has computed."""
        made = replace(self)
        vars(made)["sides"] = (mu, lam)  # where `cached_property` looks
        return made

    @cached_property
    def spectrum(self) -> Spectrum:
        """Bases of B and A; values μ_i λ_j."""
        mu, lam = (side.to(self.home) for side in self.sides)
        with torch.inference_mode(False):
            return Spectrum(mu[..., :, None] * lam[..., None, :], self._rotation)

    def _rotation(self) -> Rotation:
        """Eigenvectors as samples and predictions turn by them."""
        return self.bases()

    def bases(self) -> Bases:
        """Eigenvectors of B and A, computed anew; None for a diagonal A."""
        left = eigenbasis(self.outputs.to(self.device).matrices(), self.name).to(self.home)
        if self.has_diagonal_input:
            return left, None
        right = eigenbasis(self.inputs.to(self.device).matrices(), self.name)
        return left, right.to(self.home)
