"""Runs convolutions in the memory order in which CPUs are fastest at them.

With channels last, oneDNN's convolutions need no copies in an order of its own, and the gradients
of their outputs are rows that lie one after another, as products of rows want them: curvature of a
wide ResNet without norms takes a tenth to a fifth less time. Norms of images take back more (batch
norm 4 to 20 %, group norm 11 to 20 %): networks that have any are left alone. Norms of tokens and
features see no images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kfac_laplace.curvature.model.forward import NORMS
from kfac_laplace.curvature.model.tensors import tensors_in

CONVOLUTIONS = {F.conv2d, torch.conv2d}
#: Calls that mean the order in memory, and would not fail at another.
BY_MEMORY = {
    Tensor.as_strided,
    Tensor.as_strided_,
    torch.as_strided,
    torch.as_strided_copy,
    torch.ops.aten.as_strided,
    torch.ops.aten.as_strided.default,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.set_,
}
#: Calls that leave code of the model's own for the backward pass, where no order can be watched.
HOOKS = {Tensor.register_hook}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ChannelsLast(TorchFunctionMode):
    """While active, hands convolutions on the CPU their images with channels last.

    The values do not change. A model that means the order of its tensors in memory may fail or
    go wrong, and one with norms gets slower: so a run in which the order was `used` counts only if
    it ended well and `harmless` is true afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used = False
        self.harmless = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call, on another order of its input where it is a convolution."""
        kwargs = kwargs or {}
        if func in HOOKS or (func in NORMS and args and args[0].ndim > 3):
            self.harmless = False
        elif self.harmless and func in CONVOLUTIONS and args and _is_images(args[0]):
            if not _has_channels_last(args[0]):
                args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
                self.used = True
        elif func in BY_MEMORY and self.used:
            self.harmless &= all(_is_plain(x) for x in tensors_in((args, kwargs)))
        return func(*args, **kwargs)


def _is_images(x: Tensor) -> bool:
    """Whether x is a batch of images that convolutions of the CPU take in either order."""
    return x.device.type == "cpu" and x.dtype in DTYPES and x.ndim == 4 and len(x) > 1


def _has_channels_last(x: Tensor) -> bool:
    """Whether x lies so already, as images of one channel do."""
    with torch._C.DisableTorchFunction():
        return x.is_contiguous(memory_format=torch.channels_last)


def _is_plain(x: Tensor) -> bool:
    """Whether x lies in memory as it would without us, as far as one can tell."""
    with torch._C.DisableTorchFunction():
        return x.is_contiguous()
