"""Which entries of a parameter are random: all, or some of them, as in a subnetwork."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entries:
    """Some entries of a tensor.

    Args:
        shape: that of the tensor.
        places: where they stand in it once it is flattened, ascending, int64; None: all of them.
    """

    shape: torch.Size
    places: Tensor | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return self.shape.numel() if self.places is None else len(self.places)

    def take(self, tensor: Tensor) -> Tensor:
        """The entries (..., count) of tensors (..., *shape)."""
        lead = tensor.shape[: tensor.ndim - len(self.shape)]
        flat = tensor.reshape((*lead, -1))
        return flat if self.places is None else flat[..., self.places.to(flat.device)]

    def spread(self, values: Tensor) -> Tensor:
        """The inverse: tensors (..., *shape) with these entries, and zero in the others."""
        if self.places is not None:
            flat = values.new_zeros((*values.shape[:-1], self.shape.numel()))
            values = flat.index_copy(-1, self.places.to(flat.device), values)
        return values.reshape((*values.shape[:-1], *self.shape))

    def __eq__(self, other: object) -> bool:
        """The same entries of tensors of one shape."""
        if not isinstance(other, Entries) or self.shape != other.shape:
            return False
        if self.places is None or other.places is None:
            return self.places is other.places
        return torch.equal(self.places, other.places)

    def __hash__(self) -> int:
        """By what is quickly told."""
        return hash((self.shape, self.count))
