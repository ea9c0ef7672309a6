"""Runs convolutions in the memory order in which CPUs are fastest at them.

With channels last, oneDNN's convolutions need no copies in an order of its own, and the gradients
of their outputs are rows that lie one after another, as products of rows want them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {F.conv2d, torch.conv2d}
#: Calls that mean the order in memory. `view` says itself when it cannot do without.
BY_MEMORY = {Tensor.as_strided, torch.as_strided, Tensor.stride, Tensor.data_ptr}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ChannelsLast(TorchFunctionMode):
    """While active, hands convolutions on the CPU their images with channels last.

    The values do not change. A model that means the order of its tensors in memory may fail or
    go wrong: `harmless` says afterwards whether that could be.
    """

    def __init__(self) -> None:
        super().__init__()
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
        if func in CONVOLUTIONS and args and _is_images(args[0]):
            args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
        elif func in BY_MEMORY and _is_reordered(args[0]):
            self.harmless = False
        elif func is Tensor.view:
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                self.harmless &= not _is_reordered(args[0])
                raise
        return func(*args, **kwargs)


def _is_images(x: Tensor) -> bool:
    """Whether x is a batch of images that convolutions of the CPU take in either order."""
    return x.device.type == "cpu" and x.dtype in DTYPES and x.ndim == 4 and len(x) > 1


def _is_reordered(x: Tensor) -> bool:
    """Whether x may lie in memory as it does because of us."""
    return not x.is_contiguous()
