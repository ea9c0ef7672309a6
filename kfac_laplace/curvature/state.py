"""A GGN as tensors and plain data, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from kfac_laplace.curvature.block_state import block_from_state, low_rank_block
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.eigen_block import EigenBlock
from kfac_laplace.curvature.estimate.settings import PartSetting, Setting
from kfac_laplace.curvature.estimate.structures import LowRank
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.plain_groups import (
    groups_from_plain,
    groups_to_plain,
    knowledge_of_groups,
    rows_to_plain,
    with_rows,
)
from kfac_laplace.curvature.state_checks import (
    check_unused,
    checked_counts,
    checked_targets,
)
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import same
from kfac_laplace.states.stored import Stored, shown

#: Gradient rows of one example hold no more: they would fill a memory of terabytes.
MOST_ENTRIES = 2**40


def ggn_to_state(ggn: GGN, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Everything that `ggn_from_state` needs beside the model and the options.

    Args:
        ggn: the result.
        dtype: torch.float32 to round curvature to its values, in tensors as wide as before.

    Raises:
        InvalidValue: another dtype, or curvature beyond the range of float32.
    """
    check_rounding(dtype)
    known = ggn.knowledge
    return {
        "structure": _structure(ggn.options),
        "likelihood": _likelihood(ggn.options),
        "estimator": _estimator(ggn.options),
        "tracked": list(known.tracked),
        "unused": list(known.unused),
        "groups": groups_to_plain(known.groups),
        "row_layouts": rows_to_plain(known.row_layouts),
        "class_axis": known.axis,
        "row_entries": known.row_entries,
        "interface": _plain_interface(known.interface),
        "settings": dict(ggn.settings),
        "blocks": {name: _sums(block, dtype) for name, block in ggn.blocks.items()},
        "kinds": {name: block.kind for name, block in ggn.blocks.items()},
        "statistic": ggn.statistic,
        "n_data": ggn.n_data,
        "n_rows": ggn.n_rows,
        "n_outputs": ggn.n_outputs,
        "targets": ggn.targets,
    }


def check_rounding(dtype: object) -> None:
    """Raise `InvalidValue` for what curvature is not rounded to."""
    if dtype not in (None, torch.float64, torch.float32):
        raise InvalidValue(
            "curvature is saved as it is or rounded to float32",
            where="dtype",
            got=shown(dtype),
            remedy="Pass dtype=torch.float32, or leave it out",
        )


def _sums(block: Block, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The raw sums of a block, rounded where that is wanted, but for counts."""
    sums = block.tensors()
    if dtype != torch.float32:
        return sums
    rounded = {k: v.float().to(v.dtype) if v.ndim > 1 else v for k, v in sums.items()}
    for name, tensor in rounded.items():
        if not bool(tensor.isfinite().all()):
            raise InvalidValue(
                "curvature beyond the range of float32",
                where=f"{block.name}, {name}",
                got=f"{float(sums[name].abs().max()):.3e}",
                remedy="Save without dtype",
            )
    return rounded


#: What such a state holds.
FIELDS = (
    "structure",
    "likelihood",
    "estimator",
    "tracked",
    "unused",
    "groups",
    "row_layouts",
    "interface",
    "class_axis",
    "row_entries",
    "settings",
    "blocks",
    "kinds",
    "statistic",
    "n_data",
    "n_rows",
    "n_outputs",
    "targets",
)


def ggn_from_state(stored: Stored, network: Network, options: CurvatureOptions) -> GGN:
    """The GGN of a state, for the same model and options.

    Raises:
        InvalidValue: the state is no GGN's, contradicts itself, or belongs to another model or to
            other options.
    """
    found = stored.fields(FIELDS)
    _check_options(found, options)
    groups = groups_from_plain(found["groups"])
    known = knowledge_of_groups(groups, network, options)
    if found["tracked"].texts() != known.tracked:
        raise found["tracked"].fault("not the trainable parameters of the model, in its order")
    axis = axis_of(found["class_axis"])
    unused = frozenset(found["unused"].texts())
    if not unused <= {*known.tracked}:
        raise found["unused"].fault("not some of the trainable parameters")
    known = replace(
        with_rows(known, found["row_layouts"]),
        effective=frozenset(known.tracked) - unused,
        told=unused,
        class_axis=-1 if axis is None else axis,
        axis_known=axis is not None,
        row_entries=found["row_entries"].whole(1, MOST_ENTRIES),
        interface=_interface(found["interface"]),
    )
    rank = known.interface.output_rank
    if axis is not None and axis >= rank > 0:
        raise found["class_axis"].fault(f"no axis of outputs that have {rank}")
    blocks = _blocks(found, known, options, network.device)
    counts = checked_counts(found, blocks)
    check_unused(found["unused"], known, blocks)
    likelihood = options.likelihood
    one = not likelihood.has_noise or likelihood.has_gaussian_noise  # others keep all residuals
    statistic = _statistic(found, () if one else None).to(network.device)
    targets = checked_targets(found["targets"], options.likelihood, counts).to(network.device)
    settings = settings_of(found["settings"], groups)
    bases = {name: b.bases() for name, b in blocks.items() if isinstance(b, EigenBlock)}
    return GGN(options, known, settings, blocks, statistic, targets=targets, bases=bases, **counts)


def _statistic(found: Mapping[str, Stored], shape: tuple[int, ...] | None) -> Tensor:
    """The likelihood's sum; one NaN where no pass over the data has told it, nor their targets."""
    value, targets = found["statistic"].value, found["targets"].tensor()
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if plain and not targets.numel() and value.shape == () and value.is_floating_point():
        if bool(value.isnan()):
            return cast(Tensor, value.detach())
    return found["statistic"].tensor(shape)


def axis_of(stored: Stored) -> int | None:
    """The class axis of a network, or None where no batch has settled it."""
    if stored.value is None:
        return None
    axis = stored.whole(-1)
    if axis == 0:
        raise stored.fault("axis 0 runs over the examples")
    return axis


def _check_options(found: Mapping[str, Stored], options: CurvatureOptions) -> None:
    """Raise `InvalidValue` unless the sums were made with these options."""
    own = {
        "structure": _structure(options),
        "likelihood": _likelihood(options),
        "estimator": _estimator(options),
    }
    for name, mine in own.items():
        if not same(found[name].value, mine):
            raise InvalidValue(
                "the state was made with another option",
                where=name,
                got=f"{shown(found[name].value)} stored, {shown(mine)} here",
                remedy="Use the options that the state was made with",
            )


def _structure(options: CurvatureOptions) -> Any:
    """The structure, with its rank, as plain data."""
    return options.to_plain()["hessian_structure"]


def _likelihood(options: CurvatureOptions) -> list[Any]:
    """Name and options of the likelihood, as plain data."""
    return [type(options.likelihood).__name__, options.likelihood.options()]


def _estimator(options: CurvatureOptions) -> str:
    """Name of what chooses the backward vectors, by which those of users are told apart."""
    return type(options.fisher).__name__


def _plain_interface(interface: Interface) -> dict[str, Any]:
    """What predictions go by, as plain data; another fit checks anew."""
    return {
        "ranks": dict(interface.ranks),
        "shared": sorted(interface.shared),
        "output_rank": interface.output_rank,
    }


def _interface(stored: Stored) -> Interface:
    """The same from plain data."""
    found = stored.fields(("ranks", "shared", "output_rank"))
    ranks = {place: rank.whole(1) for place, rank in found["ranks"].items().items()}
    return Interface(ranks, frozenset(found["shared"].texts()), found["output_rank"].whole())


def settings_of(stored: Stored, groups: tuple[Group, ...]) -> dict[str, Setting]:
    """Expand or reduce, for every group with Kronecker factors and no other."""
    settings = stored.fields([g.name for g in groups if g.treatment == "kron"])
    parts = {group.name: group.layout.parts for group in groups}
    return {name: _setting(one, parts[name]) for name, one in settings.items()}


def _setting(stored: Stored, parts: int) -> Setting:
    """One setting, or several of a weight's parts."""
    choices = get_args(PartSetting)
    if isinstance(stored.value, str) or parts == 1:
        return cast(PartSetting, stored.text(choices))
    return tuple(cast(PartSetting, one.text(choices)) for one in stored.entries(parts))


def _blocks(
    found: Mapping[str, Stored], known: Knowledge, options: CurvatureOptions, device: torch.device
) -> dict[str, Block]:
    """One block for each group, or one of all, each of the kind that is asked for; or none."""
    layouts = {group.name: group.block_layout for group in known.groups}
    kinds: dict[str, str] = {group.name: group.treatment for group in known.groups}
    if options.hessian_structure == "ekfac":
        kinds = {name: "ekfac" if kind == "kron" else kind for name, kind in kinds.items()}
    if options.hessian_structure == "diag":
        kinds = dict.fromkeys(kinds, "diag")
    if (whole := options.one_block) is not None:
        treated = "dense" if whole == "full" else whole
        layouts, kinds = ({whole: known.full_layout}, {whole: treated}) if layouts else ({}, {})
    stored = found["blocks"].items()
    if stored or found["kinds"].items():
        stored = found["blocks"].fields(kinds)
        for name, kind in found["kinds"].fields(kinds).items():
            kind.text((kinds[name],))
    diagonal = {group.name for group in known.groups if group.diagonal}
    rank, home = options.rank, options.home(device)
    if isinstance(options.hessian_structure, LowRank):
        assert rank is not None
        return {n: low_rank_block(stored[n], layouts[n], rank, device) for n in kinds if stored}
    return {
        name: block_from_state(
            stored[name], kinds[name], layouts[name], name in diagonal, device, rank, home
        )
        for name in kinds
        if stored
    }
