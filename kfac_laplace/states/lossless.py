"""Tensors in less room without the loss of a bit: a narrower precision, one of two triangles."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Precisions that may hold all values of a wider one, narrowest first.
NARROWER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: So many entries tell of most tensors that no narrower precision holds them.
SOME = 512


@dataclass(frozen=True)
class Small:
    """A tensor as it is stored.

    Args:
        stored: its entries; of symmetric matrices (..., i, i) the triangles (..., i(i + 1)/2).
        dtype: of the tensor itself.
        rows: i where it is symmetric, else None.
    """

    stored: Tensor
    dtype: torch.dtype
    rows: int | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> "Small":
        """The smallest form from which `tensor` gives every bit back, in memory of its own or not.

        Args:
            tensor: an ordinary one, on the CPU.
        """
        tensor, dtype, rows = tensor.detach(), tensor.dtype, None
        if tensor.is_floating_point() and tensor.element_size() in BITS:
            if _is_symmetric(tensor):
                rows = tensor.shape[-1]
                tensor = tensor[..., _below(rows)]
            tensor = _narrowest(tensor)
        return cls(tensor.contiguous(), dtype, rows)

    def tensor(self) -> Tensor:
        """The tensor, which may lie in the memory of `stored`."""
        entries = self.stored.to(self.dtype)
        if self.rows is None:
            return entries
        below = _below(self.rows)
        matrices = entries.new_empty(*entries.shape[:-1], self.rows, self.rows)
        matrices[..., below] = entries
        matrices.mT[..., below] = entries
        return matrices


def _below(rows: int) -> Tensor:
    """Mask (i, i) of the entries on and below the diagonal."""
    return torch.ones(rows, rows, dtype=torch.bool, device="cpu").tril()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal also in the signs of zeros and in what NaN carries."""
    bits = BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def _is_symmetric(tensor: Tensor) -> bool:
    """Whether a tensor is symmetric matrices of two rows or more."""
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] < 2:
        return False
    corner = tensor[..., :SOME, :1], tensor.mT[..., :SOME, :1]
    return _same_bits(*(part.contiguous() for part in corner)) and _same_bits(
        tensor.contiguous(), tensor.mT.contiguous()
    )


def _narrowest(tensor: Tensor) -> Tensor:
    """The same values in the narrowest precision that holds them all."""
    some = tensor.flatten()[:: max(1, tensor.numel() // SOME)].contiguous()
    for dtype in NARROWER.get(tensor.dtype, ()):
        if _same_bits(some, some.to(dtype).to(tensor.dtype)):
            narrow, whole = tensor.to(dtype), tensor.contiguous()
            if _same_bits(whole, narrow.to(tensor.dtype)):
                return narrow
    return tensor
