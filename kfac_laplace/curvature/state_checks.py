"""Whether the parts of a stored GGN agree with one another."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.structures import TOGETHER
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.states.stored import Stored

#: Sums that say nothing of an effect: what layers get, and bases.
NO_SIGN = ("input_", "output_basis")
BASES = ("input_basis", "output_basis")


def checked_counts(found: Mapping[str, Stored], blocks: Mapping[str, Block]) -> dict[str, float]:
    """Numbers of examples, rows and outputs, which are there together, and with curvature alone.

    Args:
        found: the entries of the state.
        blocks: its curvature.
    """
    counts = {name: found[name].count() for name in ("n_data", "n_rows", "n_outputs")}
    if not blocks and any(counts.values()):
        raise found["blocks"].fault("data without blocks", f"{counts['n_data']} examples")
    if len({count > 0 for count in counts.values()}) > 1:
        got = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise found["n_data"].fault("examples, rows and outputs are there together or not", got)
    if counts["n_outputs"] < counts["n_rows"]:
        raise found["n_outputs"].fault("a row has an output at the least")
    if not counts["n_data"] and any(map(_is_nonzero, blocks.values())):
        raise found["n_data"].fault("blocks without data")
    return counts


def _is_nonzero(block: Block) -> bool:
    """Whether data are in a block, whose bases stand where there are none as well."""
    return any(bool(one.any()) for name, one in block.tensors().items() if name not in BASES)


def checked_targets(stored: Stored, likelihood: Likelihood, counts: Mapping[str, float]) -> Tensor:
    """Sums over the targets: none, or a matrix with columns for the outputs of a row, or for one.

    Args:
        stored: the sums.
        likelihood: that they are of.
        counts: numbers of examples or nodes, and of outputs.
    """
    sums = stored.tensor()
    if not sums.numel():
        return sums
    if sums.ndim != 2:
        raise stored.fault("not sums by output", tuple(sums.shape))
    rows = likelihood.target_rows
    if rows is None:  # of a user's own, which may be any
        return sums
    if not counts["n_rows"]:  # all that there was, with weight zero
        return sums
    most = counts["n_outputs"] / counts["n_rows"]
    # Fewer where examples have several rows, and one where these have several widths.
    if len(sums) != rows or sums.shape[1] > most * (1 + 1e-6):
        raise stored.fault(f"shape ({rows}, {most:g} or less) is needed", tuple(sums.shape))
    if bool((sums[[0, -1]] < 0).any()):
        raise stored.fault("numbers of targets and sums of squares are ≥ 0")
    return sums


def check_unused(stored: Stored, known: Knowledge, blocks: Mapping[str, Block]) -> None:
    """Raise `InvalidValue` where parameters without effect have curvature.

    Args:
        stored: their names.
        known: the groups.
        blocks: of the groups, or one of all.
    """
    unused = {*known.unused}
    for group in known.groups:
        params = group.layout.params
        if unused.issuperset(params) and group.name in blocks:
            sums = blocks[group.name].tensors()
            # Of Kronecker factors one suffices: what layers get says nothing of their effect.
            told = {k: v for k, v in sums.items() if not k.startswith(NO_SIGN)}
            if any(bool(tensor.any()) for tensor in told.values()):
                raise stored.fault("parameters without effect have curvature", ", ".join(params))
    whole = next((blocks[name] for name in TOGETHER if name in blocks), None)
    if whole is not None and unused:
        sizes = {name: each.count for name, each in known.entries.items()}
        flags = torch.cat(
            [torch.full((n,), name in unused, device="cpu") for name, n in sizes.items()]
        )
        sums = whole.tensors()
        columns = sums["matrix"] if "matrix" in sums else sums["rows"]
        if bool(columns[:, flags.to(columns.device)].any()):
            raise stored.fault("parameters without effect have curvature")
