"""What a tuner keeps for rounds without a pass over the data, as plain data and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kfac_laplace.curvature.block_state import block_from_state
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.state_checks import checked_targets
from kfac_laplace.marglik.shared import EpochFit
from kfac_laplace.states.stored import Stored


def last_pass_to_plain(last: GGN | None) -> dict[str, Any] | None:
    """Tensors and plain data, beside the groups."""
    if last is None:
        return None
    return {
        "blocks": {name: block.tensors() for name, block in last.blocks.items()},
        "unused": list(last.knowledge.unused),
        "n_data": last.n_data,
        "n_rows": last.n_rows,
        "n_outputs": last.n_outputs,
        "targets": last.targets,
    }


KEPT = ("blocks", "unused", "n_data", "n_rows", "n_outputs", "targets")


def last_pass_from_plain(
    stored: Stored,
    known: Knowledge | None,
    options: CurvatureOptions,
    settings: Mapping[str, Setting],
    device: torch.device,
) -> GGN | None:
    """The inverse.

    Args:
        stored: the plain data.
        known: the groups, None where the state has none.
        options: of the tuner.
        settings: expand or reduce by group, as the tuner decided.
        device: of the model.

    Raises:
        InvalidValue: they contradict one another.
    """
    if stored.value is None:
        return None
    found = stored.fields(KEPT)
    if known is None:
        raise stored.fault("a pass over the data without groups")
    groups = {group.name: group for group in known.groups}
    blocks = {}
    for name, one in found["blocks"].items().items():
        if name not in groups:
            raise one.fault("no group of that name")
        group = groups[name]
        blocks[name] = block_from_state(one, group.treatment, group.layout, group.diagonal, device)
    unused = frozenset(found["unused"].texts())
    if not unused <= {*known.tracked}:
        raise found["unused"].fault("not some of the trainable parameters")
    counts = {name: found[name].count() for name in ("n_data", "n_rows", "n_outputs")}
    if not all(counts.values()):
        raise found["n_data"].fault("a pass over no data")
    targets = checked_targets(found["targets"], options.likelihood, counts).to(device)
    known = replace(known, effective=frozenset(known.tracked) - unused)
    return GGN(
        options,
        known,
        settings,
        blocks,
        n_data=counts["n_data"],
        n_rows=counts["n_rows"],
        n_outputs=counts["n_outputs"],
        targets=targets,
    )


def epoch_fit_from_plain(stored: Stored, device: torch.device) -> EpochFit:
    """How well an epoch's outputs fitted, from its fields by name."""
    found = stored.fields(("statistic", "rows"))
    if found["statistic"].value is None and found["rows"].value is None:
        return EpochFit()
    rows = found["rows"].tensor(()).to(device)
    return EpochFit(found["statistic"].tensor().to(device), rows)
