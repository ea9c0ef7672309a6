"""Whether curvature is finite, asked once for all blocks: a device has to finish its work first."""

from collections.abc import Mapping

import torch

from kfac_laplace.curvature.estimate.blocks import Block


def not_finite(blocks: Mapping[str, Block]) -> str | None:
    """Name of a block with a raw sum that is not finite; None where all are."""
    # One pass a tensor: a sum is finite only if its terms are.
    sums: dict[torch.device, dict[str, list[torch.Tensor]]] = {}
    for name, block in blocks.items():
        for tensor in block.tensors().values():
            if tensor.numel():
                told = sums.setdefault(tensor.device, {}).setdefault(name, [])
                told.append(tensor.sum().isfinite())
    for own in sums.values():
        names = [name for name, told in own.items() for _ in told]
        finite = torch.stack([one for told in own.values() for one in told]).tolist()
        for name, fine in zip(names, finite, strict=True):
            if not fine:
                return name
    return None
