"""Global random states: another one for a while, and draws of extreme values."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_laplace.devices import CPU, is_other, random_state, seed_draws
from kfac_laplace.process import own_generators, set_states


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The global random states of torch (CPU and one device), numpy and Python.

    Args:
        device: the device.
        cpu: torch's own on the CPU.
        other: that of the device, if it has one.
        numpy: numpy's.
        python: Python's.
    """

    device: torch.device
    cpu: Tensor
    other: Tensor | None
    numpy: dict[str, Any]
    python: Any

    @classmethod
    def now(cls, device: torch.device) -> "RandomStates":
        """Today's."""
        other = random_state(device) if is_other(device) else None
        numpy = np.random.get_state(legacy=False)
        assert isinstance(numpy, dict)
        return cls(device, random_state(CPU), other, numpy, random.getstate())

    def restore(self) -> None:
        """Put them back."""
        other = {} if self.other is None else {self.device: self.other}
        set_states({CPU: self.cpu, **other})
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain data."""
        key = torch.from_numpy(self.numpy["state"]["key"].astype(np.int64))
        version, words, gauss = self.python
        return {
            "cpu": self.cpu,
            "other": self.other,
            "numpy": {**self.numpy, "state": {**self.numpy["state"], "key": key}},
            "python": [version, torch.tensor(words, dtype=torch.int64, device="cpu"), gauss],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> "RandomStates":
        """The inverse; on the CPU without another device's state."""
        state = plain["numpy"]["state"]
        state = {**state, "key": state["key"].numpy().astype(np.uint32)}
        version, words, gauss = plain["python"]
        other = plain["other"] if is_other(device) else None
        python = (version, tuple(words.tolist()), gauss)
        return cls(device, plain["cpu"], other, {**plain["numpy"], "state": state}, python)

    def same(self, other: "RandomStates") -> bool:
        """Whether nothing was drawn between the two."""
        mine, theirs = self.numpy["state"], other.numpy["state"]
        return (
            self.same_in_torch(other)
            and mine["pos"] == theirs["pos"]
            and np.array_equal(mine["key"], theirs["key"])
            and self.python == other.python
        )

    def same_in_torch(self, other: "RandomStates") -> bool:
        """Whether torch's are equal."""
        if self.other is not None and other.other is not None:
            return torch.equal(self.cpu, other.cpu) and torch.equal(self.other, other.other)
        return torch.equal(self.cpu, other.cpu)


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Global random states are put back after; one thread at a time may seed them anew inside."""
    with own_generators(device):
        before = RandomStates.now(device)
        try:
            yield
        finally:
            before.restore()


def seed_everywhere(device: torch.device, seed: int) -> None:
    """Other global random states, on the CPU and one device."""
    for one in {CPU, device}:
        seed_draws(one, seed)
    np.random.seed(seed)
    random.seed(seed)


#: Draws of zeros and ones, and of numbers, by the names of torch's operations.
COINS = {"bernoulli", "bernoulli_", "native_dropout"}
NUMBERS = {
    "exponential",
    "exponential_",
    "normal",
    "normal_",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "uniform",
    "uniform_",
}


class ExtremeDraws(TorchDispatchMode):
    """Has torch draw the same low, or the same high value each time: no rare event stays unseen.

    Args:
        high: which of the two.
    """

    def __init__(self, high: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        self._high = high

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call, and overwrite what it drew."""
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "native_dropout" and not (args[1] > 0 and args[2] is not False):
            return output
        if name in COINS or name in NUMBERS:
            for tensor in tree_leaves(output):
                if name in COINS:
                    tensor.fill_(self._high)
                elif tensor.is_floating_point():  # logarithms of it and its complement are finite
                    near = torch.finfo(tensor.dtype).eps
                    tensor.fill_(1 - near if self._high else near)
        return output
