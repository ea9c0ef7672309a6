"""The block of Kronecker factors of which wide ones are their leading directions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.curvature.estimate.structures import Kron
from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.curvature.linalg.leading_gram import LeadingGram, is_wide
from kfac_laplace.curvature.linalg.spectrum import Rotation
from kfac_laplace.curvature.rows.layout import Layout


@dataclass(frozen=True)
class LeadingBlock(KroneckerBlock):
    """B ⊗ A, each as it is where it is narrow, or RᵀR + ρ (I − Π) where it is wide.

    Args:
        input_rest: trace (b,) of what was left out of A, times its count; zeros where A is narrow.
        output_rest: trace (b,) of what was left out of B.
        rank: how many directions wide factors keep.
    """

    input_rest: Tensor
    output_rest: Tensor
    rank: int = Kron.rank
    additive: ClassVar[bool] = False

    @classmethod
    def of(
        cls,
        layout: Layout,
        inputs: Gram | Tensor,
        count: Tensor,
        outputs: Gram,
        rank: int = Kron.rank,
    ) -> Self:
        """The block of two Gram matrices, or of a diagonal (b, i) and one."""
        inputs = inputs if isinstance(inputs, Gram) else Gram(inputs, inputs[:, None, :][:, :0])
        sums = inputs.packed, inputs.rows, count, outputs.packed, outputs.rows
        return cls(layout, *sums, _rest(inputs, count), _rest(outputs, count), rank)

    def with_factors(self, inputs: Gram | Tensor, count: Tensor, outputs: Gram) -> Self:
        """A block of the same parameters and rank with other factors."""
        return self.of(self.layout, inputs, count, outputs, self.rank)

    def with_outputs(self, matrices: Tensor) -> Self:
        """The block with another B (b, o, o)."""
        wide = is_wide(matrices.shape[-1], self.rank)
        outputs = LeadingGram.nearest(matrices, self.rank) if wide else Gram.of(matrices)
        inputs = self.input_sum if self.has_diagonal_input else self.inputs
        return self.with_factors(inputs, self.input_count, outputs)

    @property
    def has_wide_input(self) -> bool:
        """Whether A is its leading directions."""
        return not self.has_diagonal_input and is_wide(self.layout.matrix[2], self.rank)

    @property
    def has_wide_output(self) -> bool:
        """Whether B is."""
        return is_wide(self.layout.matrix[1], self.rank)

    @property
    def inputs(self) -> Gram:
        """Σ a aᵀ, where it is no diagonal."""
        if self.has_wide_input:
            return LeadingGram.of_rows(self.input_rows, self.input_rest, self.rank)
        return super().inputs

    @property
    def outputs(self) -> Gram:
        """B."""
        if self.has_wide_output:
            return LeadingGram.of_rows(self.output_rows, self.output_rest, self.rank)
        return super().outputs

    @property
    def held(self) -> tuple[float, float]:
        """The trace of RᵀR ⊗ RᵀR, and that of the whole block."""
        inputs, outputs = (side.double() for side in self.traces())
        count = self._divisor.double()
        most = (inputs - self.input_rest) * (outputs - self.output_rest) / count
        return float(most.sum()), float((inputs * outputs / count).sum())

    def scaled(self, weight: float) -> Self:
        """B times a weight; A keeps its value, and counts that much less in averages."""
        rests = weight * self.input_rest, weight * self.output_rest
        return replace(super().scaled(weight), input_rest=rests[0], output_rest=rests[1])

    def tensors(self) -> dict[str, Tensor]:
        """The raw sums by field name."""
        return {name: value for name, value in super().tensors().items() if name != "rank"}

    def sums(self) -> dict[str, Tensor]:
        """Copies of these: directions of two data sets do not add entry by entry."""
        return Block.sums(self)

    @classmethod
    def from_tensors(
        cls, layout: Layout, tensors: Mapping[str, Tensor], rank: int = Kron.rank
    ) -> Self:
        """Rebuild a block from `tensors()` and its rank."""
        return cls(layout, **tensors, rank=rank)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The block of the same parameters and rank with other raw sums."""
        return self.from_tensors(self.layout, tensors, self.rank)

    def _rotation(self) -> Rotation:
        """Few eigenvectors of wide factors, and reflections that complete them."""
        left = self.outputs.to(self.device).basis(self.name).to(self.home)
        if self.has_diagonal_input:
            return left, None
        return left, self.inputs.to(self.device).basis(self.name).to(self.home)


def _rest(gram: Gram, count: Tensor) -> Tensor:
    """What was left out of a Gram matrix, (b,), where the counts are."""
    if isinstance(gram, LeadingGram):
        return gram.rest.to(count.device)
    return count.new_zeros(len(gram.packed), dtype=gram.packed.dtype)
