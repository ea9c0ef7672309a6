"""Tensors made of tracked parameters alone: the parameters, parts of them, functions of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_laplace.curvature.model.tensors import tensors_in
from kfac_laplace.curvature.rows.layout import Fold


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a parameter, perhaps with its axes moved.

    Args:
        index: which part, in the order of the parameter's entries.
        count: number of parts.
        fold: how the part's entries become the tensor; None for a plain reshape.
    """

    index: int = 0
    count: int = 1
    fold: Fold | None = None


WHOLE = Part()


@dataclass(frozen=True)
class Source:
    """A tensor that depends on tracked parameters and on no data.

    Args:
        tensor: itself, in the graph.
        params: names of the parameters it is made of.
        part: where it lies in its one parameter, or None for any other function of parameters.
        version: version of the tensor when it was made.
        edge: its gradient edge when it was made.
    """

    tensor: Tensor
    params: tuple[str, ...]
    part: Part | None
    version: int
    edge: GradientEdge

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter itself."""
        return self.tensor.is_leaf

    @property
    def own_part(self) -> Part | None:
        """Its part of a parameter, unless it was written to in place."""
        return self.part if self.tensor._version == self.version else None


#: These return what they are given, at most in another precision or memory.
IDENTITIES = {
    Tensor.to,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.type_as,
    Tensor.clone,
    torch.clone,
    Tensor.contiguous,
}


class Sources:
    """The sources known so far, by the identity of their tensors.

    Args:
        tracked: parameter names and the tensors that the model will use for them.
    """

    def __init__(self, tracked: Mapping[str, Tensor]):
        self._tracked = dict(tracked)
        self._known = {
            id(t): Source(t, (n,), WHOLE, t._version, get_gradient_edge(t))
            for n, t in tracked.items()
        }

    def get(self, tensor: Tensor | None) -> Source | None:
        """The source that a tensor is, or None."""
        known = self._known.get(id(tensor))
        if known is not None and known.tensor._version != known.version:
            self.forget(known.tensor)  # written to through a view, with who knows what
            return None
        return known

    def forget(self, tensor: Tensor) -> None:
        """Data were written into a tensor."""
        self._known.pop(id(tensor), None)

    def derive(self, func: Callable[..., Any], output: Any, made_of: list[Source]) -> None:
        """Take the outputs of a call on sources alone for sources.

        Without gradients only a parameter that was written to is one. What autograd functions make
        of theirs in `forward` has no edge yet: a view there asks for a gradient all the same.
        """
        names = tuple(dict.fromkeys(name for source in made_of for name in source.params))
        only = made_of[0] if len(made_of) == 1 else None
        for tensor in tensors_in(output):
            made = torch.is_grad_enabled() or any(tensor is t for t in self._tracked.values())
            if made and tensor.requires_grad and self.get(tensor) is None:
                part = self._part(func, tensor, only)
                self._known[id(tensor)] = Source(
                    tensor, names, part, tensor._version, get_gradient_edge(tensor)
                )

    def _part(self, func: Callable[..., Any], tensor: Tensor, source: Source | None) -> Part | None:
        """Where a new tensor lies in the parameter of its only source."""
        part = source.own_part if source is not None else None
        if source is None or part is None:
            return None
        if func in IDENTITIES:
            return part
        parameter = self._tracked[source.params[0]]
        return _view_part(tensor, parameter) if tensor._base is parameter else None


def _view_part(view: Tensor, parameter: Tensor) -> Part | None:
    """A view as one of equal contiguous parts of a parameter, or None if it is no such thing."""
    size, total = view.numel(), parameter.numel()
    if not parameter.is_contiguous() or not size or total % size:
        return None
    offset = view.storage_offset() - parameter.storage_offset()
    axes = sorted(range(view.ndim), key=lambda k: (view.stride()[k], view.shape[k]), reverse=True)
    expected = size
    for axis in axes:  # without gaps or overlaps, strides are products of the sizes below
        if view.shape[axis] != 1:
            expected //= view.shape[axis]
            if view.stride(axis) != expected:
                return None
    if offset % size:
        return None
    fold = None
    if [axis for axis in axes if view.shape[axis] != 1] != sorted(
        axis for axis in axes if view.shape[axis] != 1
    ):
        order = tuple(axes.index(axis) for axis in range(view.ndim))
        fold = Fold(tuple(view.shape[axis] for axis in axes), order)
    return Part(offset // size, total // size, fold)
