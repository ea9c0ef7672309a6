"""How a model takes inputs and gives outputs, as far as batches with targets have shown it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue


@dataclass(frozen=True)
class Interface:
    """What targets have told about inputs and outputs; predictions, which have none, go by it.

    Args:
        ranks: axes of the inputs whose first one ran over the examples, by their place in the
            caller's nesting; the fewest that were seen.
        shared: places of the inputs that have a first axis of another length: masks, positions.
        output_rank: axes of the outputs of several examples, 0 before any were seen.
        checked: examples of the batch on which `first_pass` looked at repetition; 0 before.
        looked: whether outputs were looked at for a softmax or sigmoid.
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    output_rank: int = 0
    checked: int = 0
    looked: bool = False

    def after(
        self, shapes: Mapping[str, torch.Size], n: int, output_rank: int, more: int = 0
    ) -> "Interface":
        """What is known after a batch of n examples.

        Args:
            shapes: shapes of the inputs with axes, by place.
            n: number of examples, by the targets.
            output_rank: axes of the output.
            more: axes that inputs have here and need not have in predictions, as those of pairs.
        """
        ranks, shared = dict(self.ranks), set(self.shared)
        for place, shape in shapes.items():
            if shape[0] == n and place not in shared:
                rank = max(1, len(shape) - more)
                ranks[place] = min(rank, ranks.get(place, rank))
            elif shape[0] != n:
                ranks.pop(place, None)
                if shape[0] != 1:  # an axis of 1 may be repeated in one batch and whole in the next
                    shared.add(place)
        # One example may have lost its axis.
        outputs = max(self.output_rank, output_rank) if n > 1 else self.output_rank
        return replace(self, ranks=ranks, shared=frozenset(shared), output_rank=outputs)

    def joined(self, other: "Interface") -> "Interface":
        """What two together have seen."""
        shared = self.shared | other.shared
        ranks = {**other.ranks, **self.ranks}
        return Interface(
            {
                place: min(rank, other.ranks.get(place, rank))
                for place, rank in ranks.items()
                if place not in shared
            },
            shared,
            max(self.output_rank, other.output_rank),
            max(self.checked, other.checked),
            self.looked or other.looked,
        )

    def afresh(self) -> "Interface":
        """The same with nothing checked yet, for another fit."""
        return replace(self, checked=0, looked=False)

    def count(self, shapes: Mapping[str, torch.Size], n: int | None) -> tuple[int, bool]:
        """The number of examples in a batch, and whether that is certain.

        Args:
            shapes: shapes of the inputs with axes, by place.
            n: number of examples by the targets, where there are any.
        """
        own = {place: shape[0] for place, shape in shapes.items() if place not in self.shared}
        known = [size for place, size in own.items() if place in self.ranks]
        every = [shape[0] for shape in shapes.values()]
        if n is not None and n in every:
            return n, True
        sizes = list(own.values()) or every
        if known and len(set(known)) == 1:
            return known[0], True
        return _likely_count(known or sizes), len(set(sizes)) == 1

    def check_ranks(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise `InvalidValue` where an input has fewer axes than in the fit.

        Args:
            shapes: shapes of all tensors among the inputs, by place.
        """
        for place, rank in self.ranks.items():
            if place in shapes and len(shapes[place]) < rank:
                got = tuple(shapes[place])
                raise InvalidValue(
                    f"{rank} axes are expected, the first of them over the examples",
                    where=f"x{place}",
                    got=f"shape {got}",
                    remedy="Give one example an axis of its own: x[None]",
                )

    def with_examples(self, output: Tensor, n: int, nodes: int | None = None) -> Tensor:
        """The output with the axis of examples that `squeeze()` took from a single one.

        Args:
            output: what the model returned.
            n: number of examples.
            nodes: number of nodes, where examples are graphs.
        """
        if n != 1:
            return output
        if self.output_rank:
            missing = self.output_rank - output.ndim
        else:
            missing = int(output.ndim == 0 or output.shape[0] not in (1, nodes))
        return output.reshape(*[1] * missing, *output.shape) if missing > 0 else output


def _likely_count(sizes: list[int]) -> int:
    """The most frequent length of first axes; of equally frequent ones the first above 1."""
    most = max(sizes.count(size) for size in sizes)
    likely = [size for size in sizes if sizes.count(size) == most]
    return next((size for size in likely if size != 1), likely[0])
