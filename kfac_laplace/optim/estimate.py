"""How the optimiser's curvature is estimated, and how often."""

from dataclasses import dataclass, fields

import numpy

from kfac_laplace.curvature.estimate import fisher as fishers
from kfac_laplace.curvature.estimate.fisher import Fisher, FisherName
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_whole


@dataclass(frozen=True)
class Estimate:
    """Which vectors stand for the curvature, in which steps, and how long factors are remembered.

    Args:
        fisher: "mc", "exact", "hybrid", "empirical" or an object such as `MonteCarlo(samples=4)`.
            "empirical" listens to the caller's own backward pass, and adds none; the others take
            one backward pass a vector to the layers' outputs. As curvature for the evidence the
            empirical Fisher is too small.
        every: steps between two captures. The first step, and those in which all bases are made
            anew at the start of a run, are captured whatever this says.
        bases_every: steps between two decompositions of a factor.
        ema: decay β of the averages over captured steps, each weighted by its examples: with sums
            S_t over the n_t examples of step t, Σ_t β^{T−t} S_t / Σ_t β^{T−t} n_t. The first step
            alone is the first factor. 1 is the plain mean over all that was seen, 0 the last step.
            In between the traces of A and B are averaged likewise with β^k, k = n_t/16 from 1 to 8,
            as they follow the loss and take fewer examples to tell.
        largest: a side of a layer wider than this stays in its own coordinates; of its A only the
            diagonal is kept, also for `curvature`.

    Raises:
        InvalidValue: an unknown estimator, or a number out of range.
        InvalidType: an option of a wrong kind.
    """

    fisher: FisherName | Fisher = "mc"
    every: int = 5
    bases_every: int = 10
    ema: float = 0.95
    largest: int = 4096

    def __post_init__(self) -> None:
        """Take numbers of numpy as Python's, and check each option."""
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, numpy.generic):
                object.__setattr__(self, option.name, value.item())
        fishers.resolve(self.fisher)
        check_whole("every", self.every, 1)
        check_whole("bases_every", self.bases_every, 1)
        check_whole("largest", self.largest, 0)
        if isinstance(self.ema, bool) or not isinstance(self.ema, int | float):
            raise InvalidType("not a number", where="ema", got=repr(self.ema))
        if not 0 <= self.ema <= 1:
            raise InvalidValue("the decay of an average lies in [0, 1]", where="ema", got=self.ema)

    @property
    def vectors(self) -> Fisher:
        """The estimator as an object."""
        return fishers.resolve(self.fisher)
