"""Rows that outputs would depend on if the rows had other values.

What a rectifier or a maximum is called does not matter here: rows that have not been seen to count
are moved at random, the model runs again, and gradients are taken there. Rows behind a mask of the
data stay without any wherever they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.layers import Layer
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.recording.live_rows import irregular, rows_reached
from kfac_laplace.curvature.recording.tape import Nudge, Recording

#: How far entries are moved, in units of the mean size of their layer's output, as powers of two:
#: far enough at first to turn a rectifier on, then less far, too, where saturation would hide rows.
FIRST, LEAST, MOST = 1.0, -3.0, 4.0
#: Moves after which to stop without any more rows, once there has been an effect on any output.
FRUITLESS = 12
#: A row of so many entries is sure to be moved up in some and down in others at once.
MANY = 8
#: Length of the table of noise; a prime, so that rows differ.
TABLE = 10007
#: A maximum over positions shows as many rows in a move as there are channels.
MOST_MOVES = 1024


@dataclass(frozen=True)
class Move:
    """Adds noise to some rows of recorded calls.

    Args:
        rows: by place of the call, a mask over the leading axes of its rows.
        sign: first there and then back, of which one turns a rectifier on.
        seed: seed of the noise.
        alone: whether all other rows become zero: nothing wins a maximum against saturated ones.
    """

    rows: Mapping[int, Tensor]
    sign: float
    seed: int
    alone: bool

    def __call__(self, call: int, layer: Layer, output: Tensor) -> None:
        """Move the rows of one call, in place."""
        rows = self.rows.get(call)
        if rows is None or tuple(rows.shape) != tuple(layer.inputs.lead):
            return
        noise = self.sign * _noise(output.shape, 1000 * self.seed + call, first=not self.seed)
        size = output.detach().abs().mean(dtype=torch.float32).clamp_min(1e-3)
        chosen = _entries(layer, output, rows)
        with torch.no_grad():
            if self.alone:
                output.mul_(chosen)
            output.add_((size * noise.to(size.device) * chosen).to(output.dtype))


def read_when_moved(
    recording: Recording,
    reached: Sequence[Tensor],
    again: Callable[[Nudge], tuple[Recording, Tensor]],
    outputs: Tensor,
    counted: Tensor | None,
) -> tuple[list[Tensor], bool]:
    """For each recorded use a mask over its rows: those reached, and those that would be.

    And whether all was tried: what a model cannot run on teaches nothing, and ends the search.

    Args:
        recording: the forward pass.
        reached: masks of the rows that count already.
        again: runs the model again with something done to its recorded calls, and gives the
            recording with its outputs (n, t, c).
        outputs: those of the pass.
        counted: as for `irregular`.
    """
    found, effect, fruitless = [mask.clone() for mask in reached], False, 0
    narrow = any(
        use.layer.matrix[0] * use.layer.matrix[1] < MANY
        for use, mask in zip(recording.uses, reached, strict=True)
        if not bool(mask.all())
    )
    without_effect = 2 if narrow else 1
    for k in range(MOST_MOVES):
        rows = {
            use.call: ~mask
            for use, mask in zip(recording.uses, found, strict=True)
            if not bool(mask.all())
        }
        if not rows or fruitless == (FRUITLESS if effect else without_effect):
            break
        move = Move(rows, sign=(-1) ** k, seed=k // 2, alone=bool(k // 2 % 2))
        try:
            moved, there = again(move)
            differs = not _equal(there, outputs, counted)
            if differs:
                reached = rows_reached(moved, there, irregular(there, counted))
        except Exception as error:  # models raise what they like at values that they never see
            if ran_out_of_memory(error):
                raise
            return found, False
        fruitless += 1
        effect |= differs
        if differs and _more(recording, moved, found, reached):
            fruitless = 0
    return found, True


def _more(
    recording: Recording, moved: Recording, found: Sequence[Tensor], reached: Sequence[Tensor]
) -> bool:
    """Add rows reached in a pass with moved rows to those found; whether there were any."""
    there = {use.call: mask for use, mask in zip(moved.uses, reached, strict=True)}
    more = False
    for use, mask in zip(recording.uses, found, strict=True):
        new = there.get(use.call)
        if new is not None and new.shape == mask.shape:
            more |= bool((new & ~mask).any())
            mask |= new
    return more


def _equal(there: Tensor, outputs: Tensor, counted: Tensor | None) -> bool:
    """Whether no output that counts has changed."""
    if there.shape != outputs.shape:
        return False
    same = there.detach() == outputs.detach()
    return bool((same if counted is None else same | (counted == 0)).all())


def _noise(shape: torch.Size, seed: int, first: bool) -> Tensor:
    """Numbers of random signs and sizes; a table of them, repeated: random numbers take time."""
    generator = torch.Generator().manual_seed(seed)
    least = FIRST if first else LEAST
    powers = torch.rand(TABLE, generator=generator, device="cpu") * (MOST - least) + least
    table = powers.exp2() * (torch.randint(2, (TABLE,), generator=generator, device="cpu") * 2 - 1)
    return table.repeat(shape.numel() // TABLE + 1)[: shape.numel()].reshape(shape)


def _entries(layer: Layer, output: Tensor, rows: Tensor) -> Tensor:
    """Which entries of a call's output are in the rows of a mask, as ones and zeros."""
    with torch.enable_grad():
        blank = torch.zeros((1, *output.shape), dtype=output.dtype, device=output.device)
        aligned = layer.output_rows(blank.requires_grad_())
        picked = rows.to(output.dtype)[None, None, ..., None].expand_as(aligned)
        (entries,) = torch.autograd.grad(aligned, blank, picked)
    return entries[0]
