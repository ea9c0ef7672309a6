"""Values of tensors and arrays, to be put back where a run wrote into them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]

#: Larger ones, in bytes, hold data rather than what a model makes of a batch: no copy is taken.
LARGEST = 2**26


class Values:
    """Copies of the values of small tensors and arrays.

    Args:
        arrays: the tensors, not the parameters among them, and numpy arrays.
    """

    def __init__(self, arrays: Sequence[Any]):
        unique = {id(array): array for array in arrays}.values()
        #: With each tensor the count of writes to it, by which graphs know that it is as it was.
        self._tensors = [
            (tensor, tensor.detach().clone(), _unsafe_preserve_version_counter(tensor))
            for tensor in unique
            if isinstance(tensor, Tensor) and _is_state(tensor)
        ]
        self._numpy = [
            (array, array.copy())
            for array in unique
            if isinstance(array, np.ndarray)
            and array.flags.writeable
            and not array.dtype.hasobject
            and array.nbytes <= LARGEST
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Write values back where they are others now."""
        for tensor, value, version in self._tensors:
            if tensor.shape != value.shape or tensor.dtype != value.dtype:
                tensor.data = value
            elif not _equal(tensor.detach(), value):
                tensor.data.copy_(value)
            version.__exit__(None, None, None)
        for array, saved in self._numpy:
            if array.shape == saved.shape and array.tobytes() != saved.tobytes():
                array[...] = saved


def _is_state(tensor: Tensor) -> bool:
    """Whether a run of the model may write to a tensor that is not for the optimiser."""
    special = isinstance(tensor, nn.Parameter) or is_functorch_wrapped_tensor(tensor)
    return (
        not special
        and type(tensor) is Tensor
        and tensor.layout == torch.strided
        and not (tensor.is_inference() or tensor.is_meta or tensor.is_quantized)
        and tensor.numel() * tensor.element_size() <= LARGEST
    )


def _equal(now: Tensor, before: Tensor) -> bool:
    """Whether two tensors of a shape hold the same values; nan is nan."""
    if torch.equal(now, before):
        return True
    return bool(((now == before) | ((now != now) & (before != before))).all())
