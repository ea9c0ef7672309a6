"""Batches as callers hand them over: inputs in any nesting, mappings with targets, graphs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from kfac_laplace.curvature.model.graphs import GraphBatch, is_graph
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.model.mappings import like, without
from kfac_laplace.curvature.model.unchanged import outside_inference
from kfac_laplace.devices import sent
from kfac_laplace.errors import InvalidType, InvalidValue

BatchFn = Callable[[Any], tuple[Any, Tensor]]


class Batch:
    """Inputs of a model, nested as the caller passed them, moved to the model's device.

    Args:
        x: a tensor, a mapping or a sequence, nested at will.
        device: where to move the tensors.
        n: number of examples, where it is known from the targets.
        interface: what is known about the model's inputs.

    Raises:
        InvalidType: there is no tensor with an axis of examples.
        InvalidValue: without n, an input that has fewer axes than in the fit.
    """

    #: No rows of which examples have different numbers.
    segments: Mapping[str, Tensor] = {}

    def __init__(
        self,
        x: Any,
        device: torch.device,
        n: int | None = None,
        interface: Interface | None = None,
    ):
        self._mapping = x if isinstance(x, Mapping) else None
        entries, self._tree = tree_flatten_with_path(dict(x) if isinstance(x, Mapping) else x)
        self._places = [keystr(path) for path, _ in entries]
        self._leaves = [
            sent(outside_inference(v), device) if isinstance(v, Tensor) else v for _, v in entries
        ]
        self._device, self._interface = device, interface or Interface()
        tensors = {
            place: leaf.shape
            for place, leaf in zip(self._places, self._leaves, strict=True)
            if isinstance(leaf, Tensor)
        }
        if n is None:
            self._interface.check_ranks(tensors)
        self.shapes = {place: shape for place, shape in tensors.items() if len(shape)}
        if not self.shapes:
            raise InvalidType("no tensor among the inputs", where="x", got=type(x).__name__)
        self.n, self.certain = self._interface.count(self.shapes, n)
        lead = {place for place, shape in self.shapes.items() if shape[0] == self.n}
        self._lead = lead - self._interface.shared or lead

    @property
    def x(self) -> Any:
        """The inputs in the caller's nesting."""
        return self.with_examples(self.by_example)

    @property
    def by_example(self) -> list[Tensor]:
        """The tensors whose first axis runs over the examples."""
        return [v for p, v in zip(self._places, self._leaves, strict=True) if p in self._lead]

    @property
    def data(self) -> list[Tensor]:
        """The tensors that differ between examples."""
        return self.by_example

    def with_examples(self, tensors: Sequence[Tensor]) -> Any:
        """The caller's nesting with the per-example tensors replaced."""
        nested = tree_unflatten(self._leaves_with(tensors), self._tree)
        return nested if self._mapping is None else like(self._mapping, nested)

    def of(self, n: int) -> "Batch":
        """The same inputs, taken for n examples."""
        return Batch(self.x, self._device, n, self._interface)

    def copied(self) -> "Batch":
        """The same inputs in tensors of their own: models may write into them."""
        return self._holding([tensor.clone() for tensor in self.by_example], self.n)

    def select(self, examples: Tensor) -> "Batch":
        """The examples of the given indices."""
        chosen = [tensor[examples.to(tensor.device)] for tensor in self.by_example]
        return self._holding(chosen, len(examples))

    def split(self, step: int) -> "Iterator[Batch]":
        """The batch in pieces of at most `step` examples."""
        pieces = zip(*(tensor.split(step) for tensor in self.by_example), strict=True)
        for piece in pieces:
            yield self._holding(piece, len(piece[0]))

    def _holding(self, tensors: Sequence[Tensor], n: int) -> "Batch":
        """Other examples in the same places: what was shared stays so, whatever its length."""
        made = copy.copy(self)
        made.n, made.certain, made._leaves = n, True, self._leaves_with(tensors)
        made.shapes = {
            place: leaf.shape
            for place, leaf in zip(made._places, made._leaves, strict=True)
            if place in self.shapes
        }
        return made

    def _leaves_with(self, tensors: Sequence[Tensor]) -> list[Any]:
        replacements = iter(tensors)
        return [
            next(replacements) if place in self._lead else leaf
            for place, leaf in zip(self._places, self._leaves, strict=True)
        ]


AnyBatch = Batch | GraphBatch


def as_batch(
    x: Any, device: torch.device, n: int | None = None, interface: Interface | None = None
) -> AnyBatch:
    """Inputs on a device, in examples; `InvalidValue` if there are none.

    Args:
        x: inputs.
        device: where to move them.
        n: number of examples, where it is known from the targets.
        interface: what is known about the model's inputs.
    """
    if isinstance(x, Batch | GraphBatch):
        return x
    batch = GraphBatch(x, device) if is_graph(x) else Batch(x, device, n, interface)
    if batch.n == 0:
        raise InvalidValue(
            "a batch without examples", where="x", got="0 examples", remedy="Drop it"
        )
    return batch


def with_examples(output: Tensor, batch: AnyBatch, interface: Interface) -> Tensor:
    """The output with the axis of examples that `squeeze()` took from a single one."""
    nodes = batch.segments.get("nodes")
    return interface.with_examples(output, batch.n, None if nodes is None else len(nodes))


def check_rows(output: Tensor, batch: AnyBatch) -> None:
    """Raise `InvalidValue` unless outputs have a row for each example, or for each node."""
    nodes = batch.segments.get("nodes")
    counts = {batch.n, batch.n if nodes is None else len(nodes)}
    if output.ndim and output.shape[0] in counts:
        return
    raise InvalidValue(
        "the output has no row for each example",
        where="model output",
        got=f"shape {tuple(output.shape)} for {batch.n} examples",
        remedy="The first axis of inputs and outputs must run over the examples; inputs shared by "
        "all of them (masks, positions) may have a leading axis of 1",
    )


def split_batch(batch: Any, key_y: str, batch_fn: BatchFn | None = None) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: a pair (x, y), a mapping that holds the targets, graphs.

    Args:
        batch: what a loader yielded.
        key_y: name of the targets in mappings.
        batch_fn: takes a batch to (x, y), where none of these forms fits.

    Raises:
        InvalidType: the batch is none of these.
        InvalidValue: the mapping has no entry `key_y`, or the graphs no `y`.
    """
    if batch_fn is not None:
        x, y = batch_fn(batch)
        return x, _target(y)
    if is_graph(batch) and getattr(batch, "y", None) is not None:
        return batch, _target(batch.y)
    if isinstance(batch, Mapping):
        if key_y not in batch:
            raise InvalidValue(
                "the batch has no targets",
                where=f"key '{key_y}'",
                got=sorted(map(str, batch)),
                remedy="Name the entry: dict_key_y, or key_y of Curvature.fit",
            )
        return without(batch, key_y), _target(batch[key_y])
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], _target(batch[1])
    raise InvalidType(
        "a batch is a pair (x, y), a mapping with targets, or graphs with y",
        where="train_loader",
        got=type(batch).__name__,
        remedy="Wrap the loader so that it yields pairs, or pass batch_fn",
    )


def _target(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        raise InvalidType(
            "targets must be a tensor",
            where="target",
            got=type(y).__name__,
            remedy="Collate them with torch.tensor",
        )
    return outside_inference(y)
