"""Which entries of the parameters share a prior precision.

A sharing says one thing: for each group, the place of its entries' precisions in the vector of all
of them. Numbers, log-determinants, sums and gradients follow from it in `Prior`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.structures import Structure, is_factored
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import unknown
from kfac_laplace.posterior.layouts import Layouts
from kfac_laplace.posterior.patterns import by_name


class Sharing(ABC):
    """Which entries share a precision."""

    @property
    def constant_on_blocks(self) -> bool:
        """Whether each group has one precision: then alone the prior commutes with any block."""
        return False

    @property
    def title(self) -> str:
        """What messages call it."""
        return type(self).__name__.lower()

    @abstractmethod
    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """For each group the places of its precisions, counted from 0, every number in use.

        Args:
            layouts: the groups of the posterior.

        Returns:
            int64 tensors broadcastable to the group's matrices (b, o, i): shape () for one
            precision, otherwise three axes, such as (b, o, 1) for one for each row.
        """


@dataclass(frozen=True)
class Scalar(Sharing):
    """One precision for all."""

    @property
    def constant_on_blocks(self) -> bool:
        """It is."""
        return True

    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """Zero everywhere."""
        return {name: torch.tensor(0, device="cpu") for name in layouts.groups}


@dataclass(frozen=True)
class Layerwise(Sharing):
    """One precision for each group: a layer with its bias, or each tensor of its own."""

    @property
    def constant_on_blocks(self) -> bool:
        """It is."""
        return True

    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """The groups' numbers."""
        return {name: torch.tensor(k, device="cpu") for k, name in enumerate(layouts.groups)}


@dataclass(frozen=True)
class Unit(Sharing):
    """One precision for each row of a group's matrices: an output unit with its bias."""

    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """Rows of each group, counted on from those before it."""
        found, start = {}, 0
        for name, layout in layouts.groups.items():
            b, o, _ = layout.matrix
            found[name] = (start + torch.arange(b * o, device="cpu")).reshape(b, o, 1)
            start += b * o
        return found


@dataclass(frozen=True)
class Input(Sharing):
    """One precision for each column of a group's matrices: an input, and the bias as another.

    In a first layer this is automatic relevance determination [MacKay 1992]: an input that does not
    matter gets a large precision, for all units at once.
    """

    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """Columns of each group, counted on from those before it."""
        found, start = {}, 0
        for name, layout in layouts.groups.items():
            b, _, i = layout.matrix
            found[name] = (start + torch.arange(b * i, device="cpu")).reshape(b, 1, i)
            start += b * i
        return found


@dataclass(frozen=True)
class Diagonal(Sharing):
    """One precision for each entry, in the order of `parameters_to_vector`."""

    @property
    def title(self) -> str:
        """As users write it."""
        return "diag"

    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """The entries' places in the vector of all parameters."""
        return layouts.pack_vector(torch.arange(layouts.size, device="cpu"))


@dataclass(frozen=True)
class ByPattern(Sharing):
    """Groups that fit one pattern of parameter names share as that pattern says.

    `{"*.bias": Scalar(), "*": Layerwise()}` is one precision for all biases together and one for
    each of the other groups. The precisions follow the order of the patterns.

    Args:
        patterns: globs to sharings; the first that a parameter fits counts.
    """

    patterns: Mapping[str, Sharing]

    @property
    def title(self) -> str:
        """The patterns."""
        return f"by pattern {list(self.patterns)}"

    @property
    def constant_on_blocks(self) -> bool:
        """Whether all its parts are."""
        return all(sharing.constant_on_blocks for sharing in self.patterns.values())

    def index(self, layouts: Layouts) -> dict[str, Tensor]:
        """Those of the patterns' own sharings, one behind the other.

        Raises:
            InvalidValue: a pattern without parameters, a parameter without a pattern, or a group
                whose parameters fit different ones.
        """
        of = by_name({p: p for p in self.patterns}, layouts.params, "prior_structure")
        chosen = {}
        for name, layout in layouts.groups.items():
            fitting = {of[param] for param in layout.params}
            if len(fitting) > 1:
                raise InvalidValue(
                    "patterns divide parameters that share a block",
                    where="prior_structure",
                    got=", ".join(f"'{param}' fits '{of[param]}'" for param in layout.params),
                    remedy="Use joint_bias=False, or one pattern for them all",
                )
            chosen[name] = fitting.pop()
        found: dict[str, Tensor] = {}
        start = 0
        for pattern, sharing in self.patterns.items():
            inside = [name for name in layouts.groups if chosen[name] == pattern]
            own = sharing.index(layouts.part(inside))
            found |= {name: start + places for name, places in own.items()}
            start += max((int(places.max()) + 1 for places in own.values()), default=0)
        return {name: found[name] for name in layouts.groups}


SharingName = Literal["layerwise", "scalar", "unit", "input", "diag"]
NAMED: dict[str, Sharing] = {
    "layerwise": Layerwise(),
    "scalar": Scalar(),
    "unit": Unit(),
    "input": Input(),
    "diag": Diagonal(),
}
#: What `prior_structure` may be.
PriorStructure = SharingName | Sharing | Mapping[str, SharingName | Sharing]


def resolve_sharing(structure: PriorStructure) -> Sharing:
    """The sharing named by a string, that of a mapping {pattern: sharing}, or the object itself.

    Raises:
        InvalidValue: an unknown name, or no pattern.
        InvalidType: neither a name nor a sharing.
    """
    if isinstance(structure, Sharing):
        return structure
    if isinstance(structure, str) and structure in NAMED:
        return NAMED[structure]
    if isinstance(structure, Mapping) and structure:
        return ByPattern({name: resolve_sharing(inner) for name, inner in structure.items()})
    if isinstance(structure, str | Mapping):
        raise unknown(
            "prior_structure", structure, NAMED, "pass {pattern: one of them} or a Sharing"
        )
    raise InvalidType(
        "neither a name nor a sharing",
        where="prior_structure",
        got=repr(structure),
        remedy="Pass a name, {pattern: name} or a Sharing",
    )


def check_sharing(sharing: Sharing, hessian_structure: Structure) -> None:
    """Raise `InvalidValue` for a prior under "kron" or "ekfac" that is not constant on each block.

    P = τ B⊗A + P₀ keeps the eigenvectors of B⊗A only where P₀ is a multiple of the identity.
    """
    if is_factored(hessian_structure) and not sharing.constant_on_blocks:
        raise InvalidValue(
            "a prior that varies within a layer does not commute with Kronecker factors",
            where="prior_structure",
            got=f"'{sharing.title}' with hessian_structure={hessian_structure!r}",
            remedy="Use prior_structure='layerwise', or hessian_structure='diag'",
        )


def check_index(index: object, layouts: Layouts, sharing: Sharing) -> None:
    """Raise `InvalidValue` unless a sharing's index is one: of all groups, without gaps."""
    found = index if isinstance(index, Mapping) else {}
    fault = "" if isinstance(index, Mapping) else f"{index!r} in place of a mapping"
    for name, layout in layouts.groups.items():
        places = found.get(name)
        shape = tuple(places.shape) if isinstance(places, Tensor) else None
        whole = layout.matrix if shape else ()
        if fault:
            break
        if shape is None or len(shape) != len(whole):
            fault = f"shape {shape} for '{name}' of matrices {layout.matrix}"
        elif any(own not in (1, full) for own, full in zip(shape, whole, strict=True)):
            fault = f"shape {shape} for '{name}' of matrices {layout.matrix}"
        elif sharing.constant_on_blocks and shape:
            fault = f"shape {shape} for '{name}', where each group has one precision"
    if not fault:
        used = torch.cat([found[name].flatten() for name in layouts.groups]).unique()
        if used.dtype != torch.int64 or not torch.equal(used, torch.arange(len(used)).to(used)):
            fault = f"places {used.tolist()[:10]}"
    if fault:
        raise InvalidValue(
            "a sharing counts its precisions from 0, none left out, by group",
            where=f"prior_structure '{sharing.title}'",
            got=fault,
            remedy="Return {name of the group: int64 tensor} for all of layouts.groups; see "
            "Sharing.index",
        )


def sharing_to_plain(structure: PriorStructure) -> Any:
    """A prior structure as plain data, or None where it holds a sharing of the user's own."""
    if isinstance(structure, ByPattern):
        structure = structure.patterns
    if isinstance(structure, Mapping):
        plain = {pattern: sharing_to_plain(inner) for pattern, inner in structure.items()}
        return None if None in plain.values() else plain
    if isinstance(structure, str):
        return structure
    return next((name for name, known in NAMED.items() if known == structure), None)
