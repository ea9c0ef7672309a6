"""Stand-ins of a model and a batch that have shapes and no numbers, and take no memory."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from kfac_laplace.curvature.model.tensors import has_values


class Shapes:
    """Makes stand-ins that can meet each other.

    A tensor on the meta device is stood in for by one on the CPU. Whole numbers and truth values
    stay what they are where they have values: lengths, masks and positions decide what a model
    does.
    """

    def __init__(self) -> None:
        # What models make themselves, such as masks, is real, and small.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def model(self, model: nn.Module) -> nn.Module:
        """A copy of a model with a stand-in for each parameter and buffer."""
        memo: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            memo[id(tensor)] = self.tensor(tensor)
        return copy.deepcopy(model, memo)

    def inputs(self, x: Any) -> Any:
        """The same nesting with a stand-in for each tensor."""
        return tree_map(lambda leaf: self.tensor(leaf) if isinstance(leaf, Tensor) else leaf, x)

    def tensor(self, tensor: Tensor) -> Tensor:
        """One stand-in, or the tensor itself where its values decide."""
        if not tensor.is_floating_point() and not tensor.is_complex() and has_values(tensor):
            return tensor
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with self._mode:
            made = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made


def some_targets(y: Tensor) -> Tensor:
    """The targets, or zeros in their place where they have no values."""
    return y if has_values(y) else torch.zeros(y.shape, dtype=y.dtype, device="cpu")
