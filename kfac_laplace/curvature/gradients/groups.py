"""Groups of parameters that share a block, found from the way the model uses them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.subnetwork import Subnetwork
from kfac_laplace.curvature.recording.sources import Part, Source
from kfac_laplace.curvature.recording.tape import Recording, Use
from kfac_laplace.curvature.rows.entries import Entries
from kfac_laplace.curvature.rows.inputs import Inputs, Ones, WithOne
from kfac_laplace.curvature.rows.layout import Chain, Layout, flat_layout
from kfac_laplace.curvature.rows.part_layout import PartLayout
from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.options import check_choice

Subset = str | Sequence[str] | Subnetwork
SUBSETS = ("all", "last_layer")
Role = Literal["joint", "weight", "bias", "exact", "generic"]
Treatment = Literal["kron", "dense", "diag"]

#: Exact blocks of layers are dense up to so many entries, and diagonal beyond.
DENSE_SIZE = 2048
#: A Kronecker factor with more rows would not fit in memory: such layers get exact diagonals.
LARGEST_FACTOR = 2**14


@dataclass(frozen=True)
class Term:
    """One use of a group with Kronecker factors.

    Args:
        use: its index in the recording.
        inputs: the input rows that meet the group.
        start: the first of the group's blocks that it uses.
    """

    use: int
    inputs: Inputs
    start: int


@dataclass(frozen=True)
class Group:
    """Parameters that share one block, and the part they play in the layers that use them.

    Args:
        name: the weight's parameter name (the bias's where only the bias is random).
        layout: how the parameters lie in the block.
        role: "joint" weight and bias, "weight" or "bias" alone, as the matrices of a layer;
            "exact" where gradients come from layer rules in any other way; "generic" without.
        treatment: its block under hessian_structure="kron".
        covered: whether layer rules cover all its uses.
        diagonal: whether its input factor A is diagonal, as that of a table is.
        part: some entries of its parameters, where no others are random.
    """

    name: str
    layout: Layout
    role: Role
    treatment: Treatment
    covered: bool = True
    diagonal: bool = False
    part: PartLayout | None = None

    @property
    def block_layout(self) -> Layout:
        """How the block's entries lie: those of `layout`, whose gradients are taken, or a part."""
        return self.part or self.layout

    def restricted(self, entries: Mapping[str, Entries]) -> "Group":
        """The same group with only some entries random, by parameter."""
        part = PartLayout.of(self.layout, entries)
        return replace(self, part=part if isinstance(part, PartLayout) else None)

    @property
    def factored(self) -> bool:
        """Whether the parameters are the matrices of layers, whatever the block's structure."""
        return self.role in ("joint", "weight", "bias")

    def used_otherwise(self, recording: Recording) -> bool:
        """Whether the matrices of layers are used in another way as well."""
        return self.factored and not recording.used_otherwise.isdisjoint(self.layout.params)

    def terms(self, recording: Recording) -> list[Term]:
        """The uses in a recording, each with the input rows that meet this group."""
        if not self.factored:
            return []
        found = []
        for index, use in enumerate(recording.uses):
            source = use.bias if self.role == "bias" else use.weight
            if source is not None and source.params == (self.name,):
                part = source.own_part
                assert part is not None
                blocks = self.layout.matrix[0] // self.layout.parts
                found.append(Term(index, self._inputs(use), part.index * blocks))
        return found

    def _inputs(self, use: Use) -> Inputs:
        inputs = use.layer.inputs
        if self.role == "joint":
            return WithOne(inputs)
        if self.role == "bias":
            return Ones(inputs.lead, use.layer.weight.detach(), 1)
        return inputs

    def own_rows(self, rows: Tensor) -> Tensor:
        """Gradient rows (v, b, *lead, o) of a use as this group sees them.

        A bias alone is one matrix (1, b·o, 1) also where its weight has several blocks.
        """
        if self.role != "bias":
            return rows
        return rows.movedim(1, -2).flatten(-2)[:, None]


def select_parameters(
    shapes: Mapping[str, torch.Size], trainable: Sequence[str], subset: Subset
) -> list[str]:
    """Names of the trainable parameters that `subset_of_weights` admits, in model order.

    "last_layer" is left open here: only a forward pass can tell which layer is used last.
    """
    if isinstance(subset, Subnetwork):
        return _of_subnetwork(subset, shapes, trainable)
    if isinstance(subset, str):
        check_choice("subset_of_weights", subset, SUBSETS, "a list of parameter-name patterns")
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


def _of_subnetwork(
    subset: Subnetwork, shapes: Mapping[str, torch.Size], trainable: Sequence[str]
) -> list[str]:
    """Names of the parameters that a subnetwork has entries of; `InvalidValue` for frozen ones."""
    inside = subset.entries(shapes)
    frozen = [name for name in inside if name not in trainable]
    if frozen:
        raise InvalidValue(
            "a subnetwork has entries of frozen parameters",
            where="subset_of_weights",
            got=", ".join(frozen),
            remedy="Set requires_grad, or leave them out. Entries are counted over all parameters "
            "of the model, frozen ones as well",
        )
    return list(inside)


def last_layer(recording: Recording) -> list[str]:
    """Parameters of the layer used last in the forward pass; scales and shifts are no layers."""
    layers = [use for use in recording.uses if use.layer.kronecker]
    alike = _ways(recording).keys() - recording.loose
    if not layers or not alike.issuperset(layers[-1].params):
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
    generic = without_examples | recording.loose
    generic |= shapes.keys() - {name for use in recording.uses for name in use.params}
    ways = {name: way for name, way in _ways(recording).items() if name not in generic}
    covered = _covered(recording) - generic
    partner = _partners(recording, ways, covered) if joint_bias else {}
    biases = set(partner.values())
    groups = []
    for name in shapes:
        if name in biases:
            continue
        names = [name, partner[name]] if name in partner else [name]
        own = {n: shapes[n] for n in names}
        if name in ways:
            groups.append(_factored(own, [ways[n] for n in names]))
        elif name in covered:
            small = sum(shape.numel() for shape in own.values()) <= DENSE_SIZE
            groups.append(Group(name, flat_layout(own), "exact", "dense" if small else "diag"))
        else:
            role: Role = "generic" if name in generic else "exact"
            groups.append(Group(name, flat_layout(own), role, "diag", covered=False))
    return tuple(groups)


@dataclass(frozen=True)
class Way:
    """How a layer with Kronecker factors uses a parameter.

    Args:
        role: "weight" or "bias".
        matrix: (b, o, i) of the whole parameter.
        parts: number of parts in which it is used.
        chain: how a part becomes matrices.
        diagonal: whether the input factor is diagonal.
    """

    role: Role
    matrix: tuple[int, int, int]
    parts: int
    chain: Chain
    diagonal: bool = False


def _factored(shapes: Mapping[str, torch.Size], ways: Sequence[Way]) -> Group:
    """A weight with or without its bias, or a bias alone, as matrices."""
    b, o, i = ways[0].matrix
    if len(ways) == 2:
        i += 1
    layout = Layout(
        tuple(shapes),
        tuple(shapes.values()),
        (b, o, i),
        ways[0].parts,
        tuple(way.chain for way in ways) if any(way.chain for way in ways) else (),
    )
    role: Role = "joint" if len(ways) == 2 else ways[0].role
    return Group(layout.params[0], layout, role, "kron", diagonal=ways[0].diagonal)


def _ways(recording: Recording) -> dict[str, Way]:
    """The way of each parameter that layers with Kronecker factors use in one way only."""
    found: dict[str, set[Way | None]] = {}
    for use in recording.uses:
        for source in use.sources:
            way = _way(use, source) if use.layer.kronecker else None
            for name in source.params:
                found.setdefault(name, set()).add(way)
    single = {name: ways.pop() for name, ways in found.items() if len(ways) == 1}
    return {name: way for name, way in single.items() if way is not None}


def _way(use: Use, source: Source) -> Way | None:
    """How a use takes a source, or None where that is no part of a parameter or too large."""
    part: Part | None = source.own_part
    b, o, i = use.layer.matrix
    if part is None or max(o, 1 if use.layer.inputs.diagonal else i) > LARGEST_FACTOR:
        return None
    if source is use.bias:
        return Way("bias", (part.count, b * o, 1), part.count, ()) if part.fold is None else None
    chain = tuple(fold for fold in (part.fold, use.layer.fold) if fold is not None)
    return Way("weight", (part.count * b, o, i), part.count, chain, use.layer.inputs.diagonal)


def _covered(recording: Recording) -> frozenset[str]:
    """Parameters that layers use as they are or in parts, and in no other way."""
    found = {name: True for use in recording.uses for name in use.params}
    for use in recording.uses:
        for source in use.sources:
            plain = use.layer.covered and source.own_part is not None
            for name in source.params:
                found[name] &= plain
    return frozenset(name for name, plain in found.items() if plain)


def _partners(
    recording: Recording, ways: Mapping[str, Way], covered: frozenset[str]
) -> dict[str, str]:
    """Weight to bias, where the two are always and only used with each other, treated alike."""
    pairs: dict[str, set[str | None]] = {}
    for use in recording.uses:
        for source, other in ((use.weight, use.bias), (use.bias, use.weight)):
            if source is not None:
                for name in source.params:
                    pairs.setdefault(name, set()).add(_partner_name(source, other))
    return {
        name: bias
        for name, others in pairs.items()
        if len(others) == 1 and (bias := next(iter(others))) is not None
        if pairs.get(bias) == {name} and _is_weight(recording, name)
        if {name, bias} <= ways.keys()
        or (not {name, bias} & ways.keys() and {name, bias} <= covered)
    }


def _partner_name(source: Source, other: Source | None) -> str | None:
    """The parameter at a source's side, if both are the same part of one parameter each."""
    part, others = source.own_part, other.own_part if other is not None else None
    if other is None or part is None or others is None:
        return None
    same = (part.index, part.count) == (others.index, others.count)
    return other.params[0] if same and len(source.params) == len(other.params) == 1 else None


def _is_weight(recording: Recording, name: str) -> bool:
    return any(use.weight is not None and name in use.weight.params for use in recording.uses)


def check_consistent(groups: Sequence[Group], recording: Recording) -> None:
    """A parameter grouped by its uses must be used in the same ways in every batch."""
    for group in groups:
        if group.used_otherwise(recording):
            raise UnsupportedUse(
                "used in another way than in the first batch",
                where=min(group.layout.params),
                remedy="Use parameters in the same way in every batch, or freeze this one",
            )
