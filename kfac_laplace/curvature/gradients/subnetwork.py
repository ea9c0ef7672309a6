"""Subnetworks: some entries of a model's parameters, whatever tensors they lie in."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.rows.entries import Entries
from kfac_laplace.errors import InvalidType, InvalidValue

WHERE = "subset_of_weights"
#: What users may pass: a mask or indices of the vector of all parameters, or masks by name.
GivenSubnetwork = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Subnetwork:
    """Entries of `parameters_to_vector(model.parameters())` [SUBNET21].

    Args:
        indices: where they stand, ascending, int64 (k,).
        size: length of that vector; None where indices were given, which do not tell it.
    """

    indices: Tensor
    size: int | None = None

    @classmethod
    def of(cls, given: object) -> "Subnetwork":
        """That of a boolean mask over the vector, or of indices into it.

        Raises:
            InvalidType: neither of the two.
            InvalidValue: no entry, one twice, or one below zero.
        """
        if not isinstance(given, Tensor) or given.ndim != 1:
            raise _none(given)
        if given.dtype == torch.bool:
            indices, size = given.detach().cpu().nonzero()[:, 0], len(given)
        elif given.dtype == torch.int64:
            indices, size = given.detach().cpu().sort().values, None
        else:
            raise _none(given)
        if not len(indices):
            raise InvalidValue("a subnetwork without entries", where=WHERE)
        if bool((indices[1:] == indices[:-1]).any()) or int(indices[0]) < 0:
            raise InvalidValue(
                "indices are whole numbers ≥ 0, each of them once",
                where=WHERE,
                got=given.tolist()[:10],
                remedy="Pass a boolean mask if that is what these numbers are",
            )
        return cls(indices, size)

    @classmethod
    def by_name(cls, masks: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> "Subnetwork":
        """That of masks by parameter name; what is not named is outside.

        Args:
            masks: boolean tensors in the shapes of their parameters.
            shapes: of all parameters, in the model's order.

        Raises:
            InvalidValue: a name or a shape that is none of the model's.
            InvalidType: a mask that is none.
        """
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise _none({name: mask})
            if mask.shape != shapes.get(name):
                raise InvalidValue(
                    "a mask has the shape of its parameter",
                    where=f"{WHERE}['{name}']",
                    got=tuple(mask.shape),
                    remedy=f"The shape is {tuple(shapes[name])}"
                    if name in shapes
                    else f"The parameters are {list(shapes)}",
                )
        whole = [
            masks[name].detach().cpu().flatten()
            if name in masks
            else torch.zeros(shape.numel(), dtype=torch.bool, device="cpu")
            for name, shape in shapes.items()
        ]
        return cls.of(torch.cat(whole))

    def entries(self, shapes: Mapping[str, torch.Size]) -> dict[str, Entries]:
        """The entries by parameter, of parameters that have any.

        Args:
            shapes: of all parameters, in the model's order.

        Raises:
            InvalidValue: a mask of another length, or an index beyond the end.
        """
        total = sum(shape.numel() for shape in shapes.values())
        if (self.size or total) != total or int(self.indices[-1]) >= total:
            raise InvalidValue(
                f"the model has {total} parameters, frozen ones counted",
                where=WHERE,
                got=f"a mask of {self.size}" if self.size else f"index {int(self.indices[-1])}",
                remedy="Count as parameters_to_vector(model.parameters()) does",
            )
        found, start = {}, 0
        for name, shape in shapes.items():
            stop = start + shape.numel()
            first, last = torch.searchsorted(
                self.indices, torch.tensor([start, stop], device="cpu")
            ).tolist()
            if last > first:
                whole = last - first == shape.numel()
                found[name] = Entries(shape, None if whole else self.indices[first:last] - start)
            start = stop
        return found

    def __eq__(self, other: object) -> bool:
        """The same entries, however they were given."""
        return isinstance(other, Subnetwork) and torch.equal(self.indices, other.indices)

    def __hash__(self) -> int:
        """By their number."""
        return hash(len(self.indices))


def _none(given: object) -> InvalidType:
    if isinstance(given, Tensor):
        got = f"{given.dtype} of shape {tuple(given.shape)}"
    elif isinstance(given, Mapping):
        got = ", ".join(f"{name}: {_kind(mask)}" for name, mask in given.items())
    else:
        got = repr(given)
    return InvalidType(
        "not a subnetwork",
        where=WHERE,
        got=got,
        remedy="Pass a boolean mask (P,) or int64 indices of parameters_to_vector, or a mapping "
        "from parameter names to boolean masks in their shapes",
    )


def _kind(mask: object) -> str:
    return str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
