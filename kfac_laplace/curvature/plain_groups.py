"""Groups of parameters, and which rows are whose, as plain data and back."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, cast, get_args

import torch

from kfac_laplace.curvature.gradients.groups import Group, Role, Treatment
from kfac_laplace.curvature.gradients.knowledge import Knowledge, UseKey
from kfac_laplace.curvature.gradients.network import Network, restricted
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.rows.layout import Chain, Fold, Layout
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.stored import Stored, refusing_damage

FIELDS = (
    "name",
    "role",
    "params",
    "shapes",
    "matrix",
    "parts",
    "folds",
    "treatment",
    "covered",
    "diagonal",
)


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


def groups_from_plain(stored: Stored) -> tuple[Group, ...]:
    """Groups from plain data.

    Raises:
        InvalidValue: not such data, layouts that are none, or groups that overlap.
    """
    groups = []
    taken: set[str] = set()
    for entry in stored.entries():
        group = _group(entry)
        if twice := taken.intersection(group.layout.params):
            raise entry.fault("a parameter stands in two groups", ", ".join(sorted(twice)))
        taken.update(group.layout.params)
        groups.append(group)
    return tuple(groups)


def _group(stored: Stored) -> Group:
    """One group, which agrees with itself."""
    found = stored.fields(FIELDS)
    layout = _layout(stored, found)
    role = cast(Role, found["role"].text(get_args(Role)))
    treatment = cast(Treatment, found["treatment"].text(get_args(Treatment)))
    group = Group(
        found["name"].text(),
        layout,
        role,
        treatment,
        found["covered"].flag(),
        found["diagonal"].flag(),
    )
    if group.name != layout.params[0]:
        raise found["name"].fault("a group is called by its first parameter")
    if group.factored != (treatment == "kron") or (group.diagonal and not group.factored):
        raise found["treatment"].fault("no treatment of such a group", f"{treatment} for {role}")
    if group.factored and len(layout.params) != (2 if role == "joint" else 1):
        raise found["params"].fault(f"not the parameters of a group that is '{role}'")
    return group


def _layout(stored: Stored, found: Mapping[str, Stored]) -> Layout:
    """A layout whose parameters fill its matrices."""
    params = found["params"].texts()
    if not params:
        raise found["params"].fault("a group has parameters")
    shapes = [entry.wholes() for entry in found["shapes"].entries(len(params))]
    matrix = tuple(entry.whole() for entry in found["matrix"].entries(3))
    chains = found["folds"].entries()
    layout = Layout(
        params,
        tuple(torch.Size(shape) for shape in shapes),
        cast(tuple[int, int, int], matrix),
        found["parts"].whole(1),
        tuple(_chain(entry) for entry in chains),
    )
    if len(chains) not in (0, len(params)):
        raise found["folds"].fault(f"none or {len(params)} are needed", f"{len(chains)} of them")
    if sum(map(prod, shapes)) != prod(matrix):
        raise found["matrix"].fault("matrices of another size than their parameters")
    if prod(matrix):
        named = zip(params, shapes, strict=True)
        blank = {name: torch.empty(shape, device="meta") for name, shape in named}
        with refusing_damage(stored.where):  # what reshapes refuse
            packed = layout.pack(blank)
            layout.unpack(packed)
        if packed.shape != matrix:
            raise found["folds"].fault("parameters that do not become the matrices")
    return layout


def _chain(stored: Stored) -> Chain:
    folds = []
    for entry in stored.entries():
        split, order = (part.wholes() for part in entry.entries(2))
        if sorted(order) != [*range(len(split))]:
            raise entry.fault("no permutation of the axes")
        folds.append(Fold(split, order))
    return tuple(folds)


def knowledge_of_groups(
    groups: tuple[Group, ...], network: Network, options: CurvatureOptions
) -> Knowledge:
    """What stored groups say about a model, which must have their parameters.

    Raises:
        InvalidValue: the model's trainable parameters are not those of the groups.
    """
    tracked = network.select(options.subset_of_weights, options.uncovered_stay_out)
    if not groups:  # of a curvature that saw no data
        return Knowledge(tracked)
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
        got = f"shape {tuple(have[wrong[0]])}" if wrong[0] in have else "no such parameter"
        there = f"{tuple(want[wrong[0]])}" if wrong[0] in want else "none"
        raise InvalidValue(
            "the state belongs to another model",
            where=wrong[0],
            got=f"{got} where the state has {there}",
            remedy="Load it into the model that it was made with, with the same parameters "
            "trainable",
        )
    if partial:
        tracked = tuple(name for name in tracked if name in want)
    return Knowledge(tracked, restricted(groups, options.subset_of_weights, network.model))


def rows_to_plain(layouts: Mapping[UseKey, RowLayout | None]) -> list[Any]:
    """Which rows are whose, as plain data."""
    return [
        [list(params), list(nth), _plain_row_layout(layout)]
        for (params, nth), layout in layouts.items()
    ]


def _plain_row_layout(layout: RowLayout | None) -> list[Any] | None:
    if layout is None:
        return None
    if isinstance(layout, Segments):
        return ["segments", layout.kind]
    assert isinstance(layout, Axis)
    return ["axis", layout.axis, layout.minor]


def with_rows(known: Knowledge, stored: Stored) -> Knowledge:
    """Knowledge with which rows are whose, from plain data.

    Raises:
        InvalidValue: not such data.
    """
    layouts: dict[UseKey, RowLayout | None] = {}
    for entry in stored.entries():
        params, nth, layout = entry.entries(3)
        kind, axes, turn = nth.entries(3)
        use = tuple(part.text() for part in params.entries())
        key = use, (kind.text(), axes.whole(), turn.whole())
        if key in layouts:
            raise entry.fault("a use stands here twice", ", ".join(use))
        layouts[key] = _row_layout(layout)
    return replace(known, row_layouts=layouts)


def _row_layout(stored: Stored) -> RowLayout | None:
    if stored.value is None:
        return None
    kind, *rest = stored.entries()
    if kind.text(("axis", "segments")) == "segments":
        (name,) = stored.entries(2)[1:]
        return Segments(name.text())
    axis, minor = stored.entries(3)[1:]
    return Axis(axis.whole(), minor.flag())
