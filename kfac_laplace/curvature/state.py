"""A curvature as tensors and plain data, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kfac_laplace.curvature.estimate.blocks import KINDS
from kfac_laplace.curvature.ggn import Curvature
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.rows.layout import Fold, Layout
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments
from kfac_laplace.errors import InvalidValue


def curvature_state(curvature: Curvature) -> dict[str, Any]:
    """Everything that `restore_curvature` needs."""
    network = curvature.network
    return {
        "structure": curvature.hessian_structure,
        "likelihood": _likelihood(curvature),
        "tracked": list(network.tracked),
        "groups": groups_to_plain(network.groups),
        "row_layouts": [
            [list(params), nth, _plain_row_layout(g)]
            for (params, nth), g in network.row_layouts.items()
        ],
        "class_axis": network.class_axis,
        "row_entries": network.row_entries,
        "settings": dict(curvature.settings),
        "blocks": {name: block.tensors() for name, block in curvature.blocks.items()},
        "kinds": {name: block.kind for name, block in curvature.blocks.items()},
        "statistic": curvature.statistic,
        "n_data": curvature.n_data,
        "n_rows": curvature.n_rows,
        "n_outputs": curvature.n_outputs,
        "generator": curvature.generator.get_state(),
    }


def restore_curvature(curvature: Curvature, state: Mapping[str, Any]) -> Curvature:
    """Fill a fresh curvature of the same model and options from a state.

    Raises:
        InvalidValue: the state is no curvature's, or belongs to another model or structure.
    """
    missing = {"structure", "groups", "blocks", "kinds", "tracked"} - set(state)
    if missing:
        raise InvalidValue("not a curvature state", where="state", got=f"no {sorted(missing)}")
    if (state["structure"], state["likelihood"]) != (
        curvature.hessian_structure,
        _likelihood(curvature),
    ):
        raise InvalidValue(
            "the state belongs to other options",
            where="state",
            got=f"structure {state['structure']!r}, likelihood {state['likelihood']!r}",
            remedy="Use the options that the state was made with",
        )
    groups = groups_from_plain(state["groups"], curvature)
    network, device = curvature.network, curvature.network.device
    network.tracked = list(state["tracked"])
    network.class_axis, network.row_entries = state["class_axis"], state["row_entries"]
    network.row_layouts = {
        (tuple(params), nth): _row_layout(plain) for params, nth, plain in state["row_layouts"]
    }
    layouts = {group.name: group.layout for group in groups}
    if curvature.hessian_structure == "full":
        layouts = {"full": curvature.full_layout}
    curvature.blocks = {
        name: KINDS[state["kinds"][name]].from_tensors(
            layouts[name], {key: tensor.to(device) for key, tensor in tensors.items()}
        )
        for name, tensors in state["blocks"].items()
    }
    curvature.settings = dict(state["settings"])
    curvature.statistic = state["statistic"].to(device)
    curvature.n_data, curvature.n_outputs = state["n_data"], state["n_outputs"]
    curvature.n_rows = state["n_rows"]
    curvature.generator.set_state(state["generator"].cpu())
    return curvature


def _likelihood(curvature: Curvature) -> list[Any]:
    """Name and options of the likelihood, as plain data."""
    return [type(curvature.likelihood).__name__, curvature.likelihood.options()]


def _plain_row_layout(row_layout: RowLayout | None) -> list[Any] | None:
    """A row layout as plain data."""
    if row_layout is None:
        return None
    if isinstance(row_layout, Segments):
        return ["segments", row_layout.kind]
    assert isinstance(row_layout, Axis)
    return ["axis", row_layout.axis, row_layout.minor]


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


def groups_from_plain(
    plain: Iterable[Mapping[str, Any]], curvature: Curvature
) -> tuple[Group, ...]:
    """Give a fresh curvature its groups, and track their parameters alone.

    Raises:
        InvalidValue: the model's trainable parameters are not those of the groups.
    """
    groups = tuple(
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
    network = curvature.network
    live = network.live_parameters()
    have = {name: p.shape for name, p in live.items()}
    want = {
        name: shape
        for group in groups
        for name, shape in zip(group.layout.params, group.layout.shapes, strict=True)
    }
    wrong = [name for name, shape in want.items() if have.get(name) != shape]
    if network.subset != "last_layer" and curvature.uncovered != "freeze":
        wrong += [name for name in have if name not in want]
    if wrong:
        raise InvalidValue(
            "the state belongs to another model",
            where=wrong[0],
            got=f"shape {have.get(wrong[0])} where the state has {want.get(wrong[0])}",
            remedy="Load it into the model that it was made with",
        )
    network.groups = groups
    if network.subset == "last_layer":
        network.tracked = [name for name in network.tracked if name in want]
    return groups
