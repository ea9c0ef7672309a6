"""Per-example gradients in factored form, of which all else is a reduction."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Per-example gradients of so many entries at most exist at a time.
GRADIENT_BUDGET = 2**24


@dataclass(frozen=True)
class Outer:
    """Per-example gradients Σ_t left[v, b, n, t] right[b, n, t]ᵀ of a group, in factored form.

    Args:
        left: gradient rows (v, b, n, t, o).
        right: input rows (b, n, t, i).
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The gradients as matrices, shape (v, n, b, o, i)."""
        if self.left.shape[-1] == self.right.shape[-1] == 1:  # a product of scalars for each row
            return (self.left * self.right).sum(3).movedim(1, 2)[..., None]
        return torch.einsum("vbnto,bnti->vnboi", self.left, self.right)

    def dense_chunks(self) -> Iterator[Tensor]:
        """The same in pieces over n of at most about `GRADIENT_BUDGET` entries."""
        v, b, _, _, o = self.left.shape
        step = max(1, GRADIENT_BUDGET // (v * b * o * self.right.shape[-1]))
        for left, right in zip(self.left.split(step, 2), self.right.split(step, 1), strict=True):
            yield Outer(left, right).dense()
