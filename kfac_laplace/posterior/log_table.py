"""The eigenvalues of all blocks in one table."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.spectrum import Spectrum


@dataclass(frozen=True)
class LogTable:
    """The eigenvalues of all blocks in one table, so that a step of the evidence is one sum.

    Args:
        logs: logarithms, shape (k,).
        weights: how often each counts, shape (k,).
        group: which group each belongs to, shape (k,).
    """

    logs: Tensor
    weights: Tensor
    group: Tensor

    @classmethod
    def of(cls, spectra: Sequence[Spectrum], device: torch.device) -> "LogTable":
        """The table of some blocks, in their order, on a device."""
        logs = [spectrum.logs for spectrum in spectra]
        with torch.inference_mode(False):
            sizes = torch.tensor([len(part.logs) for part in logs], device="cpu")
            group = torch.arange(len(logs), device="cpu").repeat_interleave(sizes)
            joined = torch.cat([part.logs.to(device) for part in logs])
            weights = torch.cat([part.weights.to(device) for part in logs])
            return cls(joined, weights, group.to(device))


#: Above it log(1 + eˣ) is x in float64.
EXACT = 40
