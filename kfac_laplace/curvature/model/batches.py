"""Batches as callers hand them over: inputs in any nesting, mappings with targets, graphs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_laplace.curvature.model.graphs import GraphBatch, is_graph
from kfac_laplace.curvature.model.mappings import like, without
from kfac_laplace.curvature.model.unchanged import outside_inference
from kfac_laplace.errors import InvalidType, InvalidValue

BatchFn = Callable[[Any], tuple[Any, Tensor]]


class Batch:
    """Inputs of a model, nested as the caller passed them, moved to the model's device.

    Args:
        x: a tensor, a mapping or a sequence, nested at will.
        device: where to move the tensors.
        n: number of examples, where it is known from the targets.
    """

    #: No rows of which examples have different numbers.
    segments: Mapping[str, Tensor] = {}

    def __init__(self, x: Any, device: torch.device, n: int | None = None):
        self._mapping = x if isinstance(x, Mapping) else None
        leaves, self._tree = tree_flatten(dict(x) if isinstance(x, Mapping) else x)
        self._leaves = [
            outside_inference(v).to(device) if isinstance(v, Tensor) else v for v in leaves
        ]
        self._device = device
        sizes = [v.shape[0] for v in self._leaves if isinstance(v, Tensor) and v.ndim]
        if not sizes:
            raise InvalidType("no tensor among the inputs", where="x", got=type(x).__name__)
        self.n = n if n in sizes else _likely_count(sizes)

    @property
    def x(self) -> Any:
        """The inputs in the caller's nesting."""
        return self.with_examples(self.by_example)

    @property
    def by_example(self) -> list[Tensor]:
        """The tensors whose first axis runs over the examples."""
        return [v for v in self._leaves if self._is_by_example(v)]

    @property
    def data(self) -> list[Tensor]:
        """The tensors that differ between examples."""
        return self.by_example

    def _is_by_example(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.n

    def with_examples(self, tensors: Sequence[Tensor]) -> Any:
        """The caller's nesting with the per-example tensors replaced."""
        replacements = iter(tensors)
        leaves = [next(replacements) if self._is_by_example(v) else v for v in self._leaves]
        nested = tree_unflatten(leaves, self._tree)
        return nested if self._mapping is None else like(self._mapping, nested)

    def copied(self) -> "Batch":
        """The same inputs in tensors of their own: models may write into them."""
        return Batch(
            self.with_examples([tensor.clone() for tensor in self.by_example]),
            self._device,
            self.n,
        )

    def select(self, examples: Tensor) -> "Batch":
        """The examples of the given indices."""
        return Batch(
            self.with_examples([tensor[examples.to(tensor.device)] for tensor in self.by_example]),
            self._device,
            len(examples),
        )

    def split(self, step: int) -> "Iterator[Batch]":
        """The batch in pieces of at most `step` examples."""
        pieces = zip(*(tensor.split(step) for tensor in self.by_example), strict=True)
        for piece in pieces:
            yield Batch(self.with_examples(piece), self._device, len(piece[0]))


def _likely_count(sizes: list[int]) -> int:
    """The most frequent length of first axes; of equally frequent ones the first above 1."""
    most = max(sizes.count(size) for size in sizes)
    likely = [size for size in sizes if sizes.count(size) == most]
    return next((size for size in likely if size != 1), likely[0])


AnyBatch = Batch | GraphBatch


def as_batch(x: Any, device: torch.device, n: int | None = None) -> AnyBatch:
    """Inputs on a device, in examples; `InvalidValue` if there are none.

    Args:
        x: inputs.
        device: where to move them.
        n: number of examples, where it is known from the targets.
    """
    if isinstance(x, Batch | GraphBatch):
        return x
    batch = GraphBatch(x, device) if is_graph(x) else Batch(x, device, n)
    if batch.n == 0:
        raise InvalidValue(
            "a batch without examples", where="x", got="0 examples", remedy="Drop it"
        )
    return batch


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
