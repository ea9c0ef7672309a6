"""The optimiser's averages as the curvature of data."""

from dataclasses import replace

import torch

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.optim.averages import Averages
from kfac_laplace.optim.learning import Learned


def averaged_ggn(
    averages: Averages,
    learned: Learned,
    options: CurvatureOptions,
    n_data: float,
    outputs: tuple[float, float],
) -> GGN:
    """The GGN of so many examples at σ = 1 and T = 1, of the groups that have been captured.

    Args:
        averages: of their blocks.
        learned: the groups.
        options: those of the curvature.
        n_data: number of examples.
        outputs: output rows and scalar outputs of an example.

    Returns:
        Blocks and counts; the statistic is NaN, as only a pass over the data tells it. Its options
        are those of the parameters that have blocks.
    """
    captured = [group for group in learned.captured if group.name in averages]
    blocks = {group.name: averages.block(group.name, n_data) for group in captured}
    groups = tuple(
        replace(group, diagonal=blocks[group.name].has_diagonal_input) for group in captured
    )
    known = replace(learned.knowledge, groups=groups)
    params = known.params
    if params != known.tracked:  # so that a state of it agrees with its options
        known = replace(known, tracked=params, effective=known.effective.intersection(params))
        options = replace(options, subset_of_weights=list(params))
    return GGN(
        options,
        known,
        {name: learned.settings[name] for name in blocks},
        blocks,
        statistic=torch.full((), torch.nan, dtype=torch.float64, device="cpu"),
        n_data=n_data,
        n_rows=n_data * outputs[0],
        n_outputs=n_data * outputs[1],
    )
