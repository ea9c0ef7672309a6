"""Parameters without effect: those that no output of any batch depends on.

The autograd graph decides, batch by batch: what an expert that is called later does is an effect.
"""

import logging
from dataclasses import replace

from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.recording.tape import Recording
from kfac_laplace.errors import InvalidValue

log = logging.getLogger("kfac_laplace")


def effective(recording: Recording) -> frozenset[str]:
    """Names of the tracked parameters that the outputs of a pass depend on."""
    return recording.loose.union(*(use.params for use in recording.uses))


def check_effect(known: Knowledge) -> None:
    """Raise `InvalidValue` unless some parameter has an effect on the outputs."""
    if not known.effective:
        raise InvalidValue(
            "no parameter has an effect on the outputs",
            where=", ".join(known.tracked[:5]) + ", …" * (len(known.tracked) > 5),
            got="outputs that depend on none of them in the autograd graph",
            remedy="Look for torch.no_grad() or detach() in forward and for adapters that merge "
            "on eval(), or choose other parameters by subset_of_weights",
        )


def tell_unused(known: Knowledge, span: str) -> Knowledge:
    """Name the parameters without effect in the log, each once.

    Args:
        known: what batches have taught.
        span: which outputs they leave alone, for the message.

    Returns:
        The same, with what was told.
    """
    names = [name for name in known.unused if name not in known.told]
    if not names:
        return known
    log.warning(
        "no effect on %s: %s. No data inform these parameters: their curvature is zero, their "
        "prior precision is not tuned, and a posterior over them is their prior. Adapters that "
        "merge on eval(), spare parameters and parts run under no_grad look like this; freeze "
        "what is not meant to be random",
        span,
        ", ".join(names),
    )
    return replace(known, told=known.told.union(names))
