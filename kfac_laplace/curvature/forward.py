"""Running the caller's model and leaving it as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers, checked to be one we can record.

    Raises:
        InvalidType: `model` is no module.
        UnsupportedUse: a scripted or compiled sub-module, or parameters on several devices.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType("not a torch.nn.Module", where="model", got=type(model).__name__)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    for name, module in model.named_modules():
        where = f"module '{name}'" if name else "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedUse(
                "a scripted module hides its layers",
                where=where,
                remedy="Pass the Python module it was scripted from",
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise UnsupportedUse(
                "a compiled module hides its layers",
                where=where,
                remedy="Pass the uncompiled module; it shares its weights with the compiled one",
            )
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedUse(
            "parameters lie on several devices",
            where="model",
            got=sorted(devices),
            remedy="Move the model to one device",
        )
    return model


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def call_with(
    model: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run the model with other tensors in place of some parameters, and put these back.

    Each slot of each module is written once, also where a module is registered under several
    names: `torch.func.functional_call` restores such a slot to the wrong tensor.
    """
    substitutes = {id(p): tensors[name] for name, p in model.named_parameters() if name in tensors}
    slots = [
        (module, key, p)
        for module in model.modules()
        for key, p in module._parameters.items()
        if p is not None and id(p) in substitutes
    ]
    try:
        for module, key, p in slots:
            module._parameters[key] = substitutes[id(p)]  # type: ignore[assignment]
        return model(*args, **kwargs)
    finally:
        for module, key, p in slots:
            module._parameters[key] = p


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; modes and global random states are put back after."""
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        # The fused attention of evaluation mode has no derivative.
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training


def split_batch(batch: Any, key_y: str) -> tuple[Any, Tensor]:
    """Inputs and targets of a batch: a pair (x, y), or a mapping that holds the targets.

    Raises:
        InvalidType: the batch is neither.
        InvalidValue: the mapping has no entry `key_y`.
    """
    if isinstance(batch, Mapping):
        if key_y not in batch:
            raise InvalidValue(
                "the batch has no targets",
                where=f"key '{key_y}'",
                got=sorted(map(str, batch)),
                remedy="Name the entry with dict_key_y",
            )
        x = {key: value for key, value in batch.items() if key != key_y}
        return x, _target(batch[key_y])
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], _target(batch[1])
    raise InvalidType(
        "a batch is a pair (x, y) or a mapping with targets",
        where="train_loader",
        got=type(batch).__name__,
        remedy="Wrap the loader so that it yields pairs",
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


def outside_inference(tensor: Tensor) -> Tensor:
    """A tensor that a backward pass may save: a copy of one made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class Batch:
    """Inputs of a model, nested as the caller passed them, moved to the model's device.

    Args:
        x: a tensor, a mapping (passed as keyword arguments) or a sequence (positional).
        device: where to move the tensors.
    """

    def __init__(self, x: Any, device: torch.device):
        leaves, self._tree = tree_flatten(dict(x) if isinstance(x, Mapping) else x)
        self._leaves = [
            outside_inference(v).to(device) if isinstance(v, Tensor) else v for v in leaves
        ]
        self._device = device
        sizes = [v.shape[0] for v in self._leaves if isinstance(v, Tensor) and v.ndim]
        if not sizes:
            raise InvalidType("no tensor among the inputs", where="x", got=type(x).__name__)
        self.n = sizes[0]

    @property
    def by_example(self) -> list[Tensor]:
        """The tensors whose first axis runs over the examples."""
        return [v for v in self._leaves if self._is_by_example(v)]

    def _is_by_example(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.n

    def _rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The caller's nesting with the per-example tensors replaced."""
        replacements = iter(tensors)
        leaves = [next(replacements) if self._is_by_example(v) else v for v in self._leaves]
        return tree_unflatten(leaves, self._tree)

    def with_examples(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model with the per-example tensors replaced."""
        x = self._rebuild(tensors)
        if isinstance(x, dict):
            return (), x
        return (tuple(x) if isinstance(x, tuple | list) else (x,)), {}

    def select(self, examples: Tensor) -> "Batch":
        """The examples of the given indices."""
        return Batch(
            self._rebuild([tensor[examples.to(tensor.device)] for tensor in self.by_example]),
            self._device,
        )

    def split(self, step: int) -> "Iterator[Batch]":
        """The batch in pieces of at most `step` examples."""
        pieces = zip(*(tensor.split(step) for tensor in self.by_example), strict=True)
        for piece in pieces:
            yield Batch(self._rebuild(piece), self._device)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model."""
        return self.with_examples(self.by_example)


def as_output(output: Any) -> Tensor:
    """The tensor that a model returned, or `InvalidType`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InvalidType(
            "the model must return one tensor (or an object with `.logits`)",
            where="model output",
            got=type(output).__name__,
            remedy="Wrap the model in a module that returns it",
        )
    return logits
