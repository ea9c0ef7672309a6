"""A call of the model as a batch: its arguments by example, and how to make the same call again."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.curvature.model.forward import as_output
from kfac_laplace.curvature.model.graphs import is_graph
from kfac_laplace.curvature.model.mappings import of_mapping
from kfac_laplace.curvature.model.tensors import tensors_in
from kfac_laplace.curvature.model.unchanged import unwrapped

#: takes what the model returns to its outputs
OutputFn = Callable[[Any], Tensor]


def called_module(model: nn.Module) -> nn.Module:
    """The module whose calls are seen: a compiled wrapper from outside, else the model itself.

    Inside a wrapper there are no calls; one for parallel data calls the module that it holds.
    """
    while not hasattr(model, "_orig_mod") and model is not unwrapped(model):
        assert isinstance(model.module, nn.Module)
        model = model.module
    return model


def in_eager_mode(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which a compiled wrapper runs the Python module that it holds."""
    if not hasattr(module, "_orig_mod"):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def inputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of a call: graphs as a batch of graphs takes them, all else as a pair.

    Args:
        model: what is called.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    if len(args) == 1 and not kwargs and is_graph(args[0]):
        return args[0]
    try:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the call will say so itself; some have no signature
        named = {}
    return dict(named) if is_graph(named) else (args, dict(kwargs))


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with what `inputs_of` made of its arguments."""
    if isinstance(inputs, tuple):
        args, kwargs = inputs
        return model(*args, **kwargs)
    return of_mapping(model, inputs) if isinstance(inputs, Mapping) else model(inputs)


def calling(output_fn: OutputFn | None) -> Callable[[nn.Module, Any], Tensor]:
    """The same, down to the outputs."""

    def outputs(model: nn.Module, inputs: Any) -> Tensor:
        return output_of(call(model, inputs), output_fn)

    return outputs


def output_of(returned: Any, output_fn: OutputFn | None) -> Tensor:
    """The outputs in what a model returned; `InvalidType` where they cannot be told."""
    return as_output(returned if output_fn is None else output_fn(returned), "output_fn")


def data_of(batch: AnyBatch, inputs: Any) -> list[Tensor]:
    """The tensors that differ between examples, as the model receives them.

    A batch holds copies of those that lie on another device than the model.
    """
    given = list(tensors_in(inputs))
    if not isinstance(batch, Batch):
        return [*given, *batch.data]
    known = {id(tensor) for tensor in given}
    if all(id(tensor) in known for tensor in batch.data):
        return batch.data
    return [tensor for tensor in given if tensor.ndim and tensor.shape[0] == batch.n]
