"""Groups of parameters that share a block, found from the way the model uses them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from kfac_laplace.curvature.layers.registry import Inputs, Ones, WithOne
from kfac_laplace.curvature.layout import Layout, flat_layout
from kfac_laplace.curvature.tape import Recording, Use
from kfac_laplace.errors import InvalidType, InvalidValue

Subset = str | Sequence[str]
Role = Literal["joint", "weight", "bias", "generic"]


@dataclass(frozen=True)
class Group:
    """Parameters that share one block, and the part they play in the layers that use them.

    Args:
        name: the weight's parameter name (the bias's where only the bias is random).
        layout: how the parameters lie in the block.
        role: "joint" weight and bias, "weight" or "bias" alone, "generic" without a layer rule.
        kronecker: whether a layer rule gives it Kronecker factors.
    """

    name: str
    layout: Layout
    role: Role
    kronecker: bool

    def terms(self, recording: Recording) -> list[tuple[int, Inputs]]:
        """Indices of the uses in a recording, each with the input rows that meet this group."""
        if self.role == "generic":
            return []
        return [
            (index, self._inputs(use))
            for index, use in enumerate(recording.uses)
            if self.name in use.params
        ]

    def _inputs(self, use: Use) -> Inputs:
        inputs = use.layer.inputs
        if self.role == "joint":
            return WithOne(inputs)
        if self.role == "bias":
            return Ones(inputs.lead, use.layer.weight.detach(), self.layout.matrix[0])
        return inputs

    def own_rows(self, rows: Tensor) -> Tensor:
        """Gradient rows (v, b, *lead, o) of a use as this group sees them.

        A bias alone is one matrix (1, b·o, 1) also where its weight has several blocks.
        """
        if self.role != "bias" or not self.kronecker:
            return rows
        return rows.movedim(1, -2).flatten(-2)[:, None]


def select_parameters(
    shapes: Mapping[str, torch.Size], trainable: Sequence[str], subset: Subset
) -> list[str]:
    """Names of the trainable parameters that `subset_of_weights` admits, in model order.

    "last_layer" is left open here: only a forward pass can tell which layer is used last.
    """
    if isinstance(subset, str):
        if subset not in ("all", "last_layer"):
            raise InvalidValue(
                "unknown subset",
                where="subset_of_weights",
                got=repr(subset),
                remedy="Choose 'all', 'last_layer' or a list of parameter-name patterns",
            )
        return list(trainable)
    if not isinstance(subset, Sequence) or not all(isinstance(p, str) for p in subset):
        raise InvalidType(
            "not a subset",
            where="subset_of_weights",
            got=repr(subset),
            remedy="Choose 'all', 'last_layer' or a list of parameter-name patterns",
        )
    for pattern in subset:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise InvalidValue(
                "pattern matches no parameter",
                where="subset_of_weights",
                got=repr(pattern),
                remedy=f"The parameters are {list(shapes)}",
            )
    return [name for name in trainable if any(fnmatchcase(name, p) for p in subset)]


def last_layer(recording: Recording) -> list[str]:
    """Parameters of the layer used last in the forward pass; scales and shifts are no layers."""
    layers = [use for use in recording.uses if use.layer.kronecker]
    if not layers or recording.loose.intersection(layers[-1].params):
        raise InvalidValue(
            "the layer used last has no rule, or is used in other ways as well",
            where="subset_of_weights",
            got="'last_layer'",
            remedy="Name the parameters by patterns instead",
        )
    return list(layers[-1].params)


def find_groups(
    recording: Recording,
    shapes: Mapping[str, torch.Size],
    joint_bias: bool,
    without_examples: frozenset[str] = frozenset(),
) -> tuple[Group, ...]:
    """Group the tracked parameters by their uses, in model order.

    Args:
        recording: a forward pass.
        shapes: tracked parameter names and shapes, in model order.
        joint_bias: whether a weight and its bias share a block.
        without_examples: parameters with a use whose rows cannot be assigned to examples; they get
            the generic treatment.
    """
    matrices = {
        name: way for name, way in _matrices(recording).items() if name not in without_examples
    }
    partner = _partners(recording, matrices) if joint_bias else {}
    biases = set(partner.values())
    groups = []
    for name, shape in shapes.items():
        if name in biases:
            continue
        if name not in matrices:
            groups.append(Group(name, flat_layout({name: shape}), "generic", False))
            continue
        role, (b, o, i), kronecker = matrices[name]
        bias = partner.get(name)
        if bias is None:
            groups.append(Group(name, Layout((name,), (shape,), (b, o, i)), role, kronecker))
        else:
            layout = Layout((name, bias), (shape, shapes[bias]), (b, o, i + 1))
            groups.append(Group(name, layout, "joint", True))
    return tuple(groups)


Way = tuple[Role, tuple[int, int, int], bool]


def _matrices(recording: Recording) -> dict[str, Way]:
    """Role, matrix shape and treatment of each parameter that layer rules alone use, in one way."""
    found: dict[str, set[Way]] = {}
    for use in recording.uses:
        b, o, i = use.layer.matrix
        kronecker = use.layer.kronecker
        alone = (1, b * o, 1) if kronecker else (b, o, 1)
        if use.weight is not None:
            found.setdefault(use.weight, set()).add(("weight", (b, o, i), kronecker))
        if use.bias is not None:
            found.setdefault(use.bias, set()).add(("bias", alone, kronecker))
    return {
        name: ways.pop()
        for name, ways in found.items()
        if len(ways) == 1 and name not in recording.loose
    }


def _partners(recording: Recording, matrices: Mapping[str, Way]) -> dict[str, str]:
    """Weight to bias, where the two are always and only used with each other."""
    pairs: dict[str, set[str | None]] = {}
    for use in recording.uses:
        for name, other in ((use.weight, use.bias), (use.bias, use.weight)):
            if name is not None:
                pairs.setdefault(name, set()).add(other)
    return {
        use.weight: use.bias
        for use in recording.uses
        if use.layer.kronecker
        and use.weight is not None
        and use.bias is not None
        and {use.weight, use.bias} <= matrices.keys()
        and pairs[use.weight] == {use.bias}
        and pairs[use.bias] == {use.weight}
    }
