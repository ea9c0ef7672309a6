"""torch distributions of output rows: brought to one shape, drawn from a generator."""

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent

from kfac_laplace.errors import InvalidValue
from kfac_laplace.process import draws_kept, own_generators


def by_row(distribution: Distribution, f: Tensor) -> Distribution:
    """The distribution of outputs f (..., c) with a batch shape (...): one for each row.

    Args:
        distribution: of batch shape (...), or (..., c) where each output has its own and they are
            independent.
        f: outputs.

    Raises:
        InvalidValue: another batch shape.
    """
    if distribution.batch_shape == f.shape[:-1]:
        return distribution
    if distribution.batch_shape == f.shape and not distribution.event_shape:
        return Independent(distribution, 1)
    raise InvalidValue(
        "a distribution for each output row, or for each output, is needed",
        where="Likelihood.distribution",
        got=f"batch shape {tuple(distribution.batch_shape)} for outputs {tuple(f.shape)}",
        remedy="Compute its parameters from f elementwise, or reduce the last axis alone",
    )


def draw(distribution: Distribution, generator: Generator) -> Tensor:
    """One draw from a distribution whose tensors are on the CPU.

    torch's distributions draw from the global random state alone: it is set from the generator, and
    put back.
    """
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    with own_generators(torch.device("cpu")), draws_kept():
        # Not torch.manual_seed, which would seed the other devices as well.
        torch.default_generator.manual_seed(int(seed))
        return distribution.sample()
