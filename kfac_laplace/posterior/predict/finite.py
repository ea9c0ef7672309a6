"""Predictions are numbers, or an error: NaN and infinity never come out in silence."""

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue

SMALLER = "raise prior_precision or lower posterior_scale"
INPUTS = (
    "Look for NaN and infinity among the inputs; a model in half precision may overflow: convert "
    "it by model.float()"
)
COVARIANCE = f"{INPUTS}. Otherwise {SMALLER}"
SAMPLES = f"Use pred_type='glm', which needs no draws of weights, or {SMALLER}. {INPUTS}"
WEIGHTS = f"Draws too far from the mode for float64: {SMALLER}"
MEAN = f"The outputs are too uncertain for a mean: {SMALLER}, or calibrate()"


def finite(values: Tensor, what: str, remedy: str) -> Tensor:
    """The values, or `InvalidValue` unless all are finite.

    Args:
        values: of any shape.
        what: what they are.
        remedy: what to do.
    """
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        raise InvalidValue(
            f"{what}: not finite",
            where="prediction",
            got=f"{int(wrong.sum())} of {wrong.numel()} entries that are NaN or infinite",
            remedy=remedy,
        )
    return values
