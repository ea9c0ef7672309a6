"""Random rotations and shifts of images, by tensor operations alone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Largest rotation, in degrees, and largest shift, as a part of the side.
DEGREES, SHIFT = 15.0, 0.1


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated and shifted at random, by bilinear interpolation; zeros come in.

    Args:
        x: images (n, c, s, s).
        generator: on the CPU, so that draws are the same on every device.
    """
    angle, across, down = torch.rand(3, len(x), generator=generator) * 2 - 1
    return moved(x, angle * math.radians(DEGREES), across * 2 * SHIFT, down * 2 * SHIFT)


def moved(x: Tensor, angle: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Each image rotated by its angle and shifted.

    Args:
        x: images (n, c, s, s).
        angle: in radians, (n,).
        across: shift, in half sides, (n,).
        down: likewise.
    """
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos, -sin, across, sin, cos, down], -1).view(-1, 2, 3)  # (n, 2, 3)
    grid = F.affine_grid(rows.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def flipped_and_cropped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and cut out of itself in a black frame of an eighth of its side.

    Args:
        x: images (n, c, s, s).
        generator: on the CPU.
    """
    n, side = len(x), x.shape[-1]
    frame = side // 8
    flip = torch.rand(n, generator=generator) < 0.5
    corner = torch.randint(2 * frame + 1, (2, n), generator=generator)
    step = torch.arange(side)
    rows = corner[0, :, None] + step  # (n, s)
    columns = corner[1, :, None] + torch.where(flip[:, None], step.flip(0), step)
    framed, example = F.pad(x, (frame,) * 4), torch.arange(n)[:, None, None]
    index = [where.to(x.device) for where in (example, rows[:, :, None], columns[:, None])]
    return framed.movedim(1, -1)[index[0], index[1], index[2]].movedim(-1, 1)
