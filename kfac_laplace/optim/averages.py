"""Moving averages of Kronecker factors over steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.rows.layout import Layout

#: Sums over examples, and how many these were.
Sums = dict[str, tuple[KroneckerBlock, float]]
#: Traces are remembered for so small a part of the steps of the factors' shapes,
SHORTER = 8
#: but for as long as they would be by the factors' own decay with so many examples in a step.
EXAMPLES = 16


@dataclass(frozen=True)
class Traces:
    """Traces of the factors of b blocks over the last steps.

    Args:
        inputs: Σ |a|² of the input rows, (b,).
        count: number of these rows, (b,).
        outputs: traces of B, (b,).
        n: number of examples.
    """

    inputs: Tensor
    count: Tensor
    outputs: Tensor
    n: float

    @classmethod
    def of(cls, block: KroneckerBlock, n: float) -> "Traces":
        """Those of one step."""
        inputs, outputs = block.traces()
        return cls(inputs, block.input_count.to(inputs), outputs, n)

    def then(self, later: "Traces", decay: float) -> "Traces":
        """These times a decay, and those of a later step."""
        return Traces(
            decay * self.inputs + later.inputs,
            decay * self.count + later.count,
            decay * self.outputs + later.outputs,
            decay * self.n + later.n,
        )

    def over(self, other: "Traces") -> tuple[Tensor, Tensor]:
        """Quotients (b,) of the mean traces of A and of B to others; 1 where those are zero."""
        inputs = self.inputs * other.count / (self.count * other.inputs)
        outputs = self.outputs * other.n / (self.n * other.outputs)
        found = [
            torch.where(one.isfinite(), one, torch.ones_like(one)) for one in (inputs, outputs)
        ]
        return found[0], found[1]


class Averages:
    """The factors of each group, averaged over the captured steps.

    What the factors look like and how large they are change at different speeds: their shapes, here
    Σ_t β^{T−t} S_t over steps t divided by their traces, need many examples, or rank is missing;
    their traces follow the loss, and few examples tell them. So traces have a decay of their own,
    β^k with k up to `SHORTER`, less where steps have few examples. Steps count by their
    examples, groups by the steps in which they were captured; the first one is the first average.

    Args:
        decay: β in [0, 1]; 1 for plain sums, 0 for the last step.
    """

    def __init__(self, decay: float):
        self._decay = decay
        self._sums: Sums = {}
        self._recent: dict[str, Traces] = {}

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
            if 0 < self._decay < 1:
                traces = Traces.of(block, n)
                if name in self._recent:
                    decay = self._decay ** max(1.0, min(SHORTER, n / EXAMPLES))
                    traces = self._recent[name].then(traces, decay)
                self._recent[name] = traces
            if name in self._sums and self._decay:
                before, weight = self._sums[name]
                before = before if self._decay == 1 else before.scaled(self._decay)
                block, n = before.absorb(block), self._decay * weight + n
            self._sums[name] = block.compact(), n

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """B (b, o, o) and A (b, i, i) of the curvature per example of the loss."""
        block, n = self._sums[name]
        inputs, outputs = block.factors
        outputs = outputs / n
        if name in self._recent:
            by_inputs, by_outputs = self._recent[name].over(Traces.of(block, n))
            inputs = inputs * by_inputs.reshape(-1, *[1] * (inputs.ndim - 1))
            outputs = outputs * by_outputs[:, None, None]
        return outputs, inputs

    def block(self, name: str, n_data: float) -> KroneckerBlock:
        """The block of so many examples."""
        block, n = self._sums[name]
        if name in self._recent:
            inputs, outputs = self._recent[name].over(Traces.of(block, n))
            block = block.with_inputs_scaled(inputs).with_loss_scaled(outputs)
        return block.scaled(n_data / n)

    def state_dict(self) -> dict[str, Any]:
        """Sums, recent traces and their weights by group."""
        return {
            name: {
                "n": n,
                "sums": dict(block.tensors()),
                "recent": vars(self._recent[name]) if name in self._recent else {},
            }
            for name, (block, n) in self._sums.items()
        }

    def load_state_dict(
        self, state: Mapping[str, Any], layouts: Mapping[str, Layout], device: torch.device
    ) -> None:
        """Take up sums as they were stored, in tensors of their own."""

        def own(tensors: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: one.to(device, copy=True) if isinstance(one, Tensor) else float(one)
                for key, one in tensors.items()
            }

        self._sums = {
            name: (
                KroneckerBlock.from_tensors(layouts[name], own(entry["sums"])),
                float(entry["n"]),
            )
            for name, entry in state.items()
        }
        self._recent = {
            name: Traces(**own(entry["recent"])) for name, entry in state.items() if entry["recent"]
        }
