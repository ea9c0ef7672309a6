"""A GGN as tensors and plain data, and back."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kfac_laplace.curvature.estimate.blocks import KINDS
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.rows.layout import Fold, Layout
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments
from kfac_laplace.errors import InvalidValue


def ggn_to_state(ggn: GGN) -> dict[str, Any]:
    """Everything that `ggn_from_state` needs beside the model and the options."""
    known = ggn.knowledge
    return {
        "structure": ggn.options.hessian_structure,
        "likelihood": _likelihood(ggn.options),
        "tracked": list(known.tracked),
        "groups": groups_to_plain(known.groups),
        "row_layouts": [
            [list(params), nth, _plain_row_layout(layout)]
            for (params, nth), layout in known.row_layouts.items()
        ],
        "class_axis": known.class_axis,
        "row_entries": known.row_entries,
        "interface": _plain_interface(known.interface),
        "settings": dict(ggn.settings),
        "blocks": {name: block.tensors() for name, block in ggn.blocks.items()},
        "kinds": {name: block.kind for name, block in ggn.blocks.items()},
        "statistic": ggn.statistic,
        "n_data": ggn.n_data,
        "n_rows": ggn.n_rows,
        "n_outputs": ggn.n_outputs,
    }


def ggn_from_state(state: Mapping[str, Any], network: Network, options: CurvatureOptions) -> GGN:
    """The GGN of a state, for the same model and options.

    Raises:
        InvalidValue: the state is no GGN's, or belongs to another model or structure.
    """
    missing = {"structure", "groups", "blocks", "kinds", "tracked"} - set(state)
    if missing:
        raise InvalidValue("not a curvature state", where="state", got=f"no {sorted(missing)}")
    if (state["structure"], state["likelihood"]) != (
        options.hessian_structure,
        _likelihood(options),
    ):
        raise InvalidValue(
            "the state belongs to other options",
            where="state",
            got=f"structure {state['structure']!r}, likelihood {state['likelihood']!r}",
            remedy="Use the options that the state was made with",
        )
    known = knowledge_of_groups(groups_from_plain(state["groups"]), network, options)
    known = replace(
        known,
        tracked=tuple(state["tracked"]),
        class_axis=state["class_axis"],
        row_entries=state["row_entries"],
        interface=_interface(state.get("interface", {})),
        row_layouts={
            (tuple(params), nth): _row_layout(plain) for params, nth, plain in state["row_layouts"]
        },
    )
    layouts = {group.name: group.layout for group in known.groups}
    if options.hessian_structure == "full":
        layouts = {"full": known.full_layout}
    device = network.device
    blocks = {
        name: KINDS[state["kinds"][name]].from_tensors(
            layouts[name], {key: tensor.to(device) for key, tensor in tensors.items()}
        )
        for name, tensors in state["blocks"].items()
    }
    return GGN(
        options,
        known,
        dict(state["settings"]),
        blocks,
        state["statistic"].to(device),
        state["n_data"],
        state["n_rows"],
        state["n_outputs"],
    )


def _likelihood(options: CurvatureOptions) -> list[Any]:
    """Name and options of the likelihood, as plain data."""
    return [type(options.likelihood).__name__, options.likelihood.options()]


def _plain_interface(interface: Interface) -> dict[str, Any]:
    """What predictions go by, as plain data; another fit checks anew."""
    return {
        "ranks": dict(interface.ranks),
        "shared": sorted(interface.shared),
        "output_rank": interface.output_rank,
    }


def _interface(plain: Mapping[str, Any]) -> Interface:
    """The same from plain data; unknown in files of earlier versions."""
    return Interface(
        {str(place): int(rank) for place, rank in plain.get("ranks", {}).items()},
        frozenset(map(str, plain.get("shared", ()))),
        int(plain.get("output_rank", 0)),
    )


def _plain_row_layout(layout: RowLayout | None) -> list[Any] | None:
    """A row layout as plain data."""
    if layout is None:
        return None
    if isinstance(layout, Segments):
        return ["segments", layout.kind]
    assert isinstance(layout, Axis)
    return ["axis", layout.axis, layout.minor]


def _row_layout(plain: list[Any] | None) -> RowLayout | None:
    """A row layout from plain data."""
    if plain is None:
        return None
    return Segments(plain[1]) if plain[0] == "segments" else Axis(*plain[1:])


def groups_to_plain(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Groups as plain data."""
    return [
        {
            "name": group.name,
            "role": group.role,
            "params": list(group.layout.params),
            "shapes": [list(shape) for shape in group.layout.shapes],
            "matrix": list(group.layout.matrix),
            "parts": group.layout.parts,
            "folds": [
                [[list(fold.split), list(fold.order)] for fold in chain]
                for chain in group.layout.folds
            ],
            "treatment": group.treatment,
            "covered": group.covered,
            "diagonal": group.diagonal,
        }
        for group in groups
    ]


def groups_from_plain(plain: Iterable[Mapping[str, Any]]) -> tuple[Group, ...]:
    """Groups from plain data."""
    return tuple(
        Group(
            entry["name"],
            Layout(
                tuple(entry["params"]),
                tuple(torch.Size(shape) for shape in entry["shapes"]),
                tuple(entry["matrix"]),
                entry["parts"],
                tuple(
                    tuple(Fold(tuple(split), tuple(order)) for split, order in chain)
                    for chain in entry["folds"]
                ),
            ),
            entry["role"],
            entry["treatment"],
            entry["covered"],
            entry["diagonal"],
        )
        for entry in plain
    )


def knowledge_of_groups(
    groups: tuple[Group, ...], network: Network, options: CurvatureOptions
) -> Knowledge:
    """What stored groups say about a model, which must have their parameters.

    Raises:
        InvalidValue: the model's trainable parameters are not those of the groups.
    """
    tracked = network.select(options.subset_of_weights)
    have = {name: p.shape for name, p in network.parameters(tracked).items()}
    want = {
        name: shape
        for group in groups
        for name, shape in zip(group.layout.params, group.layout.shapes, strict=True)
    }
    wrong = [name for name, shape in want.items() if have.get(name) != shape]
    partial = options.subset_of_weights == "last_layer"
    if not partial and options.uncovered != "freeze":
        wrong += [name for name in have if name not in want]
    if wrong:
        raise InvalidValue(
            "the state belongs to another model",
            where=wrong[0],
            got=f"shape {have.get(wrong[0])} where the state has {want.get(wrong[0])}",
            remedy="Load it into the model that it was made with",
        )
    if partial:
        tracked = tuple(name for name in tracked if name in want)
    return Knowledge(tracked, groups)
