"""Moving averages of Kronecker factors over steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.rows.layout import Layout

#: Sums over examples, and how many these were.
Sums = dict[str, tuple[KroneckerBlock, float]]


class Averages:
    """Σ_t β^{T−t} S_t over captured steps t, and Σ_t β^{T−t} n_t, for each group.

    Its quotient is the average per example. Steps count by their examples, groups by the steps in
    which they were captured; the first one is the first average.

    Args:
        decay: β in [0, 1]; 1 for plain sums.
    """

    def __init__(self, decay: float):
        self._decay = decay
        self._sums: Sums = {}

    def __contains__(self, name: str) -> bool:
        """Whether a group has been captured."""
        return name in self._sums

    @property
    def names(self) -> list[str]:
        """Groups that have been captured."""
        return list(self._sums)

    def add(self, sums: Sums) -> None:
        """Add one step, whose tensors nobody else may hold."""
        for name, (block, n) in sums.items():
            if name in self._sums and self._decay:
                before, weight = self._sums[name]
                before = before if self._decay == 1 else before.scaled(self._decay)
                block, n = before.absorb(block), self._decay * weight + n
            self._sums[name] = block.compact(), n

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """B (b, o, o) and A (b, i, i) of the curvature per example of the loss."""
        block, n = self._sums[name]
        inputs, outputs = block.factors
        return outputs / n, inputs

    def block(self, name: str, n_data: float) -> KroneckerBlock:
        """The block of so many examples."""
        block, n = self._sums[name]
        return block.scaled(n_data / n)

    def state_dict(self) -> dict[str, Any]:
        """Sums and their weights by group."""
        return {
            name: {"n": n, "sums": dict(block.tensors())} for name, (block, n) in self._sums.items()
        }

    def load_state_dict(
        self, state: Mapping[str, Any], layouts: Mapping[str, Layout], device: torch.device
    ) -> None:
        """Take up sums as they were stored, in tensors of their own."""
        self._sums = {
            name: (
                KroneckerBlock.from_tensors(
                    layouts[name],
                    {key: t.to(device, copy=True) for key, t in entry["sums"].items()},
                ),
                float(entry["n"]),
            )
            for name, entry in state.items()
        }
