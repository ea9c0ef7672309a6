"""A recorded batch run again: parts of it, under other random states."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import with_examples
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.model.random_states import RandomStates, seed_everywhere
from kfac_laplace.process import own_warnings

#: Other random states that a model which draws is asked in.
SEEDS = range(100, 108)
#: Rounding may move outputs by so many times what a change of each weight's last digit does.
ROUNDING = 16
#: What TF32 keeps of a float32 number's digits.
TF32 = 2.0**-10


class Repetition:
    """A recorded batch, of which the model runs parts again.

    Args:
        passed: the recorded pass.
    """

    def __init__(self, passed: ForwardPass):
        self._passed, self.n = passed, passed.n
        self._weights: Mapping[str, Tensor] = passed.params
        self._left: RandomStates | None = None  # as the last run left them
        self.draws = False

    @cached_property
    def limit(self) -> float:
        """Difference up to which outputs are the same.

        Half the digits of the coarsest precision in which the model computes, relative to the
        largest output; and half those of float64 where outputs are small.
        """
        expected = self._recorded
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        return max(_precision(self._passed) ** 0.5 * largest, torch.finfo(torch.double).eps ** 0.5)

    def outputs(
        self,
        part: Sequence[int] | None,
        seed: int,
        mode: AbstractContextManager[Any] | None = None,
    ) -> Tensor | None:
        """Outputs of some examples, of all by None, in that order; None where the model cannot.

        Args:
            part: indices of the examples.
            seed: of the random states.
            mode: context in which the model runs.
        """
        device = self._passed.device
        seed_everywhere(device, seed)
        before = RandomStates.now(device)
        try:
            with own_warnings(), mode or nullcontext():
                warnings.simplefilter("ignore")  # those of the model are the caller's, once
                output = self._run(part)
        except Exception as error:  # models raise what they like at batches that they do not know
            if ran_out_of_memory(error):
                raise
            return None
        self._left = RandomStates.now(device)
        self.draws |= not before.same(self._left)
        return output

    def seeds_itself(self, part: Sequence[int] | None) -> bool:
        """Whether the model leaves one random state whatever it finds: its draws are constants."""
        left = []
        for seed in SEEDS[:2]:
            self.outputs(part, seed)
            left.append(self._left)
        first, second = left
        return first is not None and second is not None and first.same_in_torch(second)

    def _run(self, part: Sequence[int] | None) -> Tensor:
        batch = self._passed.batch
        if part is not None:
            batch = batch.select(torch.tensor(part, device="cpu"))
        own = batch.copied()
        try:
            output = self._passed.forward(own.x, self._weights)
        except RuntimeError as error:  # some take derivatives inside
            if ran_out_of_memory(error):
                raise
            with torch.enable_grad():
                output = self._passed.forward(batch.copied().x, self._weights)
        output = with_examples(output.detach(), batch, self._passed.knowledge.interface)
        return accumulable(output)

    @cached_property
    def _recorded(self) -> Tensor:
        return accumulable(self._passed.recording.output.detach())

    def expected(self, part: Sequence[int] | None) -> Tensor:
        """The recorded outputs of some examples."""
        if part is None:
            return self._recorded
        nodes = self._passed.output_segments
        if nodes is None:
            return self._recorded[torch.tensor(part, device=self._recorded.device)]
        index = self._passed.batch.segments["nodes"].to(self._recorded.device)
        return torch.cat([self._recorded[index == k] for k in part])

    def off(self, part: Sequence[int] | None, output: Tensor | None) -> float:
        """By how much outputs differ from the recorded ones; 0 where there are none."""
        return 0.0 if output is None else difference(output, self.expected(part), self.limit)

    def rounding(self, part: Sequence[int] | None) -> float:
        """What rounding may do to outputs: they move with the last digit of each weight."""
        here, weights = self.outputs(part, 0), self._weights
        generator = torch.Generator().manual_seed(0)
        self._weights = {
            name: p + _precision(self._passed) * p * _signs(p, generator)
            for name, p in weights.items()
        }
        moved, self._weights = self.outputs(part, 0), weights
        if here is None or moved is None:
            return 0.0
        return ROUNDING * difference(moved, here, 0.0)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, device="cpu") * 2 - 1
    return signs.to(like)


def _precision(passed: ForwardPass) -> float:
    """Machine precision of the coarsest numbers that the model may compute with."""
    dtypes = {passed.recording.output.dtype, *(p.dtype for p in passed.forward.model.parameters())}
    device = passed.device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    found = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    # Convolutions take TF32 by default, and which kernel does depends on the size of the batch.
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return max(found, TF32) if device == "cuda" and found > 1e-15 and tf32 else found


def difference(got: Tensor, want: Tensor, limit: float) -> float:
    """The largest difference of two outputs of the same examples.

    Sequences may be shorter where a longer one is not in the batch: the common part counts. Where
    that differs by more than `limit` too, or where rows are missing, it is infinite.
    """
    if got.ndim != want.ndim and got.numel() == want.numel():
        got = got.reshape(want.shape)
    if got.ndim != want.ndim or got.shape[:1] != want.shape[:1]:
        return torch.inf
    common = tuple(slice(min(sizes)) for sizes in zip(got.shape, want.shape, strict=True))
    change = (got[common] - want[common]).abs()
    largest = float(change.max()) if change.numel() else 0.0
    if largest != largest or (got.shape != want.shape and largest > limit):
        return torch.inf
    return largest
