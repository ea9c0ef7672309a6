"""Gaussian priors N(θ | μ, diag δ⁻¹) whose precisions are shared by all, by layer, or by none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kfac_laplace.curvature.model.unchanged import outside_inference
from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_choice

Structure = Literal["layerwise", "scalar", "diag"]
STRUCTURES = ("layerwise", "scalar", "diag")


@dataclass(frozen=True)
class PriorStructure:
    """How prior precisions are shared.

    Args:
        sharing: "scalar" one δ for all, "layerwise" one for each group, "diag" one for each entry.
        layouts: group name to layout, in the order of the precisions.
        params: parameter names in the order of a "diag" vector.
    """

    sharing: Structure
    layouts: Mapping[str, Layout]
    params: Sequence[str]

    @property
    def length(self) -> int:
        """Number of distinct precisions."""
        if self.sharing == "scalar":
            return 1
        if self.sharing == "layerwise":
            return len(self.layouts)
        return self.size

    @property
    def size(self) -> int:
        """Number of scalar parameters p."""
        return sum(layout.size for layout in self.layouts.values())

    def full(self, precision: Tensor) -> Tensor:
        """The precisions as a vector (length,), from such a vector or from one value for all."""
        if precision.numel() == 1:
            return precision.reshape(1).expand(self.length)
        if precision.shape != (self.length,):
            raise InvalidValue(
                f"a '{self.sharing}' prior has {self.length} precisions",
                where="prior_precision",
                got=f"shape {tuple(precision.shape)}",
                remedy="Pass one value, or one for each entry of that structure",
            )
        return precision

    def by_group(self, precision: Tensor) -> dict[str, Tensor]:
        """δ of each group, broadcastable to its matrices (b, o, i)."""
        precision = self.full(precision)
        if self.sharing == "diag":
            return self.pack(precision)
        values = precision.expand(len(self.layouts))
        return dict(zip(self.layouts, values, strict=True))

    def pack(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector (..., p) in parameter order into the groups' matrices (..., b, o, i)."""
        tensors = self.by_parameter(vector)
        return {name: layout.pack(tensors) for name, layout in self.layouts.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter, in parameter order."""
        shapes = {
            name: shape
            for layout in self.layouts.values()
            for name, shape in zip(layout.params, layout.shapes, strict=True)
        }
        return {name: shapes[name] for name in self.params}

    def by_parameter(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector (..., p) in parameter order into tensors (..., *shape)."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `pack`: matrices (..., b, o, i) to one vector (..., p)."""
        tensors: dict[str, Tensor] = {}
        for name, layout in self.layouts.items():
            tensors |= layout.unpack(matrices[name])
        parts = [
            tensors[name].reshape((*tensors[name].shape[: tensors[name].ndim - len(shape)], -1))
            for name, shape in self.shapes.items()
        ]
        return torch.cat(parts, -1)


def check_sharing(sharing: str, hessian_structure: str) -> None:
    """Raise `InvalidValue` for an unknown prior structure, or a diagonal prior under "kron"."""
    check_choice("prior_structure", sharing, STRUCTURES)
    if sharing == "diag" and hessian_structure == "kron":
        raise InvalidValue(
            "a diagonal prior does not commute with Kronecker factors",
            where="prior_structure",
            got="'diag' with hessian_structure='kron'",
            remedy="Use prior_structure='layerwise', or hessian_structure='diag'",
        )


def positive(value: object, where: str, device: torch.device | None = None) -> Tensor:
    """A hyperparameter as a float64 tensor that keeps its graph, checked to be positive."""
    tensor = real(value, where, device)
    inside = tensor.detach()
    if inside.numel() == 0 or not bool((inside > 0).all()):
        raise InvalidValue(
            "must be positive and finite", where=where, got=value, remedy="Pass a positive number"
        )
    return tensor


def one_number(tensor: Tensor, where: str) -> Tensor:
    """The tensor as a scalar (), or `InvalidValue`."""
    if tensor.numel() != 1:
        raise InvalidValue("one number is needed", where=where, got=f"shape {tuple(tensor.shape)}")
    return tensor.reshape(())


def real(value: object, where: str, device: torch.device | None = None) -> Tensor:
    """A finite float64 tensor that keeps its graph, usable inside and outside inference mode."""
    try:
        with torch.inference_mode(False):
            tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
            tensor = outside_inference(tensor).clone()  # never the caller's own storage
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(
            "not a number or tensor", where=where, got=repr(value), remedy="Pass a real number"
        ) from error
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise InvalidValue("must be finite", where=where, got=value)
    return tensor
