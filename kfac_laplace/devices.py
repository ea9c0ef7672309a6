"""What differs between devices: how tensors get there, when work is done, whose draws are whose."""

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, which the CPU does not wait for if it goes to one from the CPU.

    The copy is made in the order of the device's own work. Who changes a tensor in pinned memory
    has to wait until the device is done, as the end of each batch of a fit does.
    """
    waits = device.type in ("cpu", "mps") or tensor.device.type != "cpu"
    return tensor.to(device, non_blocking=not waits)


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if is_other(device):
        module = _module(device)
        module.synchronize() if device.type == "mps" else module.synchronize(device)


def is_other(device: torch.device) -> bool:
    """Whether torch can be asked for the work and the random numbers of a device of its own."""
    known = device.type not in ("cpu", "meta") and hasattr(torch, device.type)
    return known and hasattr(_module(device), "get_rng_state")


def random_state(device: torch.device) -> Tensor:
    """Torch's global random state on a device."""
    if not is_other(device):
        return torch.get_rng_state()
    module = _module(device)
    found: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return found


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set it."""
    if not is_other(device):
        torch.set_rng_state(state)
    elif device.type == "mps":
        _module(device).set_rng_state(state)
    else:
        _module(device).set_rng_state(state, device)


def seed_draws(device: torch.device, seed: int) -> None:
    """Begin torch's random numbers on a device anew; those of other devices stay."""
    if not is_other(device):
        torch.default_generator.manual_seed(seed)
        return
    module = _module(device)
    generators = getattr(module, "default_generators", ())
    if generators:
        index = module.current_device() if device.index is None else device.index
        generators[index].manual_seed(seed)
    else:
        module.manual_seed(seed)


def _module(device: torch.device) -> Any:
    """`torch.cuda`, `torch.mps`, `torch.xpu`."""
    return torch.get_device_module(device)
