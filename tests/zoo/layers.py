"""How each kind of layer multiplies: its input rows, its output rows, its weight as matrices."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


class Kind:
    """A linear layer: rows are all axes but the last. `module` has a `weight` (o, i).

    `shared` says whether rows without a gradient are left out of A where an example has several.
    """

    shared = True

    def __init__(self, module: nn.Module):
        self.module = module

    def input_rows(self, x: Tensor) -> Tensor:
        """Rows (r, g, i)."""
        return x.reshape(-1, 1, x.shape[-1])

    def output_rows(self, s: Tensor) -> Tensor:
        """Rows (r, g, o) of an output or its gradient."""
        return s.reshape(-1, 1, s.shape[-1])

    def reaches(self, x: Tensor) -> Tensor:
        """Which rows of an input let a gradient through to the weight, (r,) or ()."""
        return torch.tensor(True)

    def lead(self, output: Tensor) -> tuple[int, ...]:
        """The axes of an output along which the rows lie."""
        return tuple(output.shape[:-1])

    def weight_order(self, entries: Tensor) -> Tensor:
        """Entries (g, o, i) in the weight's own shape."""
        return entries[0]


class Transposed(Kind):
    """Hugging Face's Conv1D: the weight is (i, o)."""

    def weight_order(self, entries: Tensor) -> Tensor:
        return entries[0].T


class Lookup(Kind):
    """An embedding: one-hot rows that meet a weight (V, d), so i = V and o = d."""

    def input_rows(self, x: Tensor) -> Tensor:
        rows = F.one_hot(x.flatten(), self.module.num_embeddings)
        return rows.to(self.module.weight.dtype)[:, None]

    def reaches(self, x: Tensor) -> Tensor:
        return x.flatten() != (-1 if (padding := self.module.padding_idx) is None else padding)

    def weight_order(self, entries: Tensor) -> Tensor:
        return entries[0].T


class Convolution(Kind):
    """Rows are patches: what a bank of unit kernels gives at each output position."""

    shared = False

    def input_rows(self, x: Tensor) -> Tensor:
        module, shape = self.module, self.module.weight.shape[1:]
        bank = torch.eye(prod(shape), dtype=x.dtype).view(-1, *shape)
        bank = bank.repeat(module.groups, *(1,) * len(shape))
        return self.output_rows(module._conv_forward(x, bank, None))

    def output_rows(self, s: Tensor) -> Tensor:
        return s.movedim(1, -1).flatten(0, -2).unflatten(1, (self.module.groups, -1))

    def lead(self, output: Tensor) -> tuple[int, ...]:
        return (output.shape[0], *output.shape[2:])

    def weight_order(self, entries: Tensor) -> Tensor:
        return entries.reshape(self.module.weight.shape)


class TransposedConvolution(Convolution):
    """The same for transposed convolutions, whose weight is (g c_in, o, *kernel)."""

    def input_rows(self, x: Tensor) -> Tensor:
        module = self.module
        c_in, size = module.in_channels // module.groups, module.kernel_size
        bank = torch.eye(c_in * prod(size), dtype=x.dtype).view(c_in, *size, -1).movedim(-1, 1)
        bank = bank.repeat(module.groups, *(1,) * (len(size) + 1))
        call = getattr(F, f"conv_transpose{len(size)}d")
        places = module.stride, module.padding, module.output_padding, module.groups
        return self.output_rows(call(x, bank, None, *places, module.dilation))

    def weight_order(self, entries: Tensor) -> Tensor:
        g, o, _ = entries.shape
        c_in = self.module.in_channels // g
        return entries.reshape(g, o, c_in, -1).transpose(1, 2).reshape(self.module.weight.shape)


def kind_of(module: nn.Module) -> Kind | None:
    """How a module multiplies, or None if it is no layer that we know."""
    if isinstance(module, _ConvTransposeNd):
        return TransposedConvolution(module)
    if isinstance(module, _ConvNd):
        return Convolution(module)
    if isinstance(module, nn.Embedding):
        return Lookup(module)
    if type(module).__name__ == "Conv1D":
        return Transposed(module)
    # PyTorch Geometric has a Linear of its own; peft's holds a layer, and is none.
    if type(module).__name__ == "Linear" and "weight" in module._parameters:
        return Kind(module)
    return Kind(module) if isinstance(module, nn.Linear) else None
