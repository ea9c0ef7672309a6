"""Symmetric matrices in half the memory, as rectangles of their lower triangle.

The lower triangle of [[A, Cᵀ], [C, B]] is the column [A; C] with A's upper triangle free, and B. Bᵀ
fits into what is free: the rectangular full packed format of LAPACK.
"""

from functools import lru_cache

import torch
from torch import Tensor

#: Mirrored by blocks down to this size; up to it entries are picked in one call. That takes 5 µs in
#: place of 22 where i = 33, 18 in place of 62 to unpack i = 129 (one core).
LEAF = 128


def pack(matrices: Tensor) -> Tensor:
    """The lower triangles of (b, i, i): (b, i + 1, i / 2) for even i, (b, i, (i + 1) / 2) for odd.

    What is above the diagonals does not matter.
    """
    i = matrices.shape[-1]
    if i <= LEAF:
        return _picked(matrices, _places(i, matrices.device)[0], _shape(i))
    return _packed(matrices)


def _packed(matrices: Tensor) -> Tensor:
    i = matrices.shape[-1]
    packed = matrices.new_empty(*matrices.shape[:-2], *_shape(i))
    width = packed.shape[-1]  # of A
    packed[..., 1 - i % 2 :, :] = matrices[..., :width]
    free = _above(packed)
    free.copy_(torch.where(_upper(free), matrices[..., width:, width:].mT, free))
    return packed


def packed_zeros(i: int, like: Tensor) -> Tensor:
    """One matrix of i rows of zeros, packed: (1, i + 1, i / 2) or (1, i, (i + 1) / 2)."""
    return like.new_zeros(1, *_shape(i))


def unpack(packed: Tensor) -> Tensor:
    """The symmetric matrices (b, i, i) whose lower triangles were packed."""
    i = size(packed)
    if i <= LEAF:
        return _picked(packed, _places(i, packed.device)[1], (i, i))
    return _unpacked(packed)


def _unpacked(packed: Tensor) -> Tensor:
    i, width = size(packed), packed.shape[-1]
    matrices = packed.new_empty(*packed.shape[:-2], i, i)
    matrices[..., :width] = packed[..., 1 - i % 2 :, :]
    matrices[..., width:, width:] = _above(packed).mT
    mirror_(matrices)
    return matrices


def _picked(entries: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Matrices (..., *shape) of entries in these places of others."""
    return entries.flatten(-2).index_select(-1, places).unflatten(-1, shape)


@lru_cache(maxsize=LEAF)
def _places(i: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in (i, i) the packed entries come from, and where in packed ones those of (i, i)."""
    with torch.inference_mode(False):  # kept, so of use outside inference mode as well
        taken = _packed(torch.arange(i * i, device=device).reshape(1, i, i))
        packed = torch.arange(taken.numel(), device=device).reshape(taken.shape)
        return taken.flatten(), _unpacked(packed).flatten()


def size(packed: Tensor) -> int:
    """Number of rows i of the matrices that were packed."""
    rows, width = packed.shape[-2:]
    return rows if rows == 2 * width - 1 else rows - 1


def diagonals(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonals of A and of B, which together are that of the matrix."""
    a = packed[..., 1 - size(packed) % 2 :, :]
    return a.diagonal(dim1=-2, dim2=-1), _above(packed).diagonal(dim1=-2, dim2=-1)


def _shape(i: int) -> tuple[int, int]:
    """Rows and columns of the rectangle."""
    return i + 1 - i % 2, (i + 1) // 2


def _above(packed: Tensor) -> Tensor:
    """The square whose upper triangle, with the diagonal, holds Bᵀ; what is below belongs to A."""
    i, width = size(packed), packed.shape[-1]
    return packed[..., : i - width, 2 * width - i :]


def mirror_(matrices: Tensor) -> None:
    """Copy what is below the diagonals of (..., i, i) to above them."""
    i = matrices.shape[-1]
    if i > LEAF:
        half = i // 2
        matrices[..., :half, half:] = matrices[..., half:, :half].mT
        mirror_(matrices[..., :half, :half])
        mirror_(matrices[..., half:, half:])
    else:
        matrices.copy_(matrices.tril() + matrices.tril(-1).mT)


def _upper(matrices: Tensor) -> Tensor:
    """A mask of the entries on and above the diagonal."""
    return torch.ones(matrices.shape[-2:], dtype=torch.bool, device=matrices.device).triu()
