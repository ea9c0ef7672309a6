"""Running the caller's model and leaving it as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from kfac_laplace.errors import InvalidType, UnsupportedUse


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


ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Forward:
    """How a model is run: mappings as keyword arguments, sequences as positional ones.

    Args:
        model: the model.
        function: called as `function(model, x)` instead, where the model wants something else.
    """

    model: nn.Module
    function: ForwardFn | None = None

    def __call__(self, x: Any, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs at x, with other tensors in place of the parameters named."""
        if params is None:
            return self._run(x)
        with substituted(self.model, params):
            return self._run(x)

    def _run(self, x: Any) -> Tensor:
        with _OrderedGradients():
            if self.function is not None:
                return as_output(self.function(self.model, x))
            if isinstance(x, dict):
                return as_output(self.model(**x))
            return as_output(self.model(*(x if isinstance(x, tuple | list) else (x,))))


@contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in place of some parameters, and these back afterwards.

    Each slot of each module is written once, also where a module is registered under several
    names: `torch.func.functional_call` restores such a slot to the wrong tensor. The model is in
    evaluation mode inside and after.
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
        _evaluate_afresh(model)  # what was kept is of other tensors
        yield
    finally:
        for module, key, p in slots:
            module._parameters[key] = p
        _evaluate_afresh(model)


def as_output(output: Any) -> Tensor:
    """The tensor that a model returned, alone or as the logits of an object or mapping."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits", logits.get("out"))
    if not isinstance(logits, Tensor):
        raise InvalidType(
            "the model must return one tensor (or an object with `.logits`)",
            where="model output",
            got=type(output).__name__,
            remedy="Wrap the model in a module that returns it, or pass forward_fn",
        )
    return logits


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; modes and global random states are put back after."""
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        _evaluate_afresh(model)
        # The fused attention of evaluation mode has no derivative.
        torch.backends.mha.set_fastpath_enabled(False)
        # Fused attention kernels leave rounding noise where gradients are zero, so that chance
        # would decide which positions count, and they have no forward-mode derivative.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        _restore_modes(model, modes)


def _evaluate_afresh(model: nn.Module) -> None:
    """Evaluation mode, without what modules have kept in it: many clear that in `train`."""
    model.train()
    model.eval()


def _restore_modes(model: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Put modules back into their modes by their own methods, parents first."""
    model.train()
    for module in model.modules():
        if module.training != modes[module]:
            module.train(modes[module])
    for module, training in modes.items():  # methods may have minds of their own
        module.training = training


#: Norms whose backward pass on the CPU mistakes gradients in another order, for a batch of one.
NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm)


class _OrderedGradients(TorchFunctionMode):
    """Has norms receive their gradients in the memory order of their outputs."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in NORMS and output.requires_grad:
            with torch._C.DisableTorchFunction():  # modes need not see this
                last = output.is_contiguous(memory_format=torch.channels_last)
            order = torch.channels_last if last and output.ndim == 4 else torch.contiguous_format
            output.register_hook(partial(_in_order, order))
        return output


def _in_order(order: torch.memory_format, gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=order)


def outside_inference(tensor: Tensor) -> Tensor:
    """A tensor that a backward pass may save: a copy of one made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
