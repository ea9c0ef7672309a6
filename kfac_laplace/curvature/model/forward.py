"""Running the caller's model and leaving it as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_laplace.curvature.model.mappings import of_mapping
from kfac_laplace.curvature.model.unchanged import evaluate_afresh
from kfac_laplace.errors import InvalidType

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Forward:
    """How a model is run: sequences as positional arguments, mappings as it takes them.

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
            if isinstance(x, Mapping):
                return as_output(of_mapping(self.model, x))
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
        evaluate_afresh(model)  # what was kept is of other tensors
        yield
    finally:
        for module, key, p in slots:
            module._parameters[key] = p
        evaluate_afresh(model)


def as_output(output: Any, option: str = "forward_fn") -> Tensor:
    """The tensor that a model returned, alone or as the logits of an object or mapping.

    Args:
        output: a tensor; an object with `.logits`; a mapping with "logits" or "out"; or a tuple or
            list whose first entry is the only tensor in it, as recurrent layers return.
        option: what the caller may pass to say which is meant.

    Raises:
        InvalidType: there is none, or there are several tensors, of which any may be meant, or it
            is complex, whole numbers or truth values.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits", logits.get("out"))
    if isinstance(logits, tuple | list):
        tensors = [entry for entry in logits if isinstance(entry, Tensor)]
        logits = logits[0] if len(tensors) == 1 else None
    if not isinstance(logits, Tensor):
        raise InvalidType(
            "the model must return one tensor (or an object with `.logits`)",
            where="model output",
            got=type(output).__name__,
            remedy=f"Wrap the model in a module that returns it, or pass {option}",
        )
    if logits.is_complex():
        raise InvalidType(
            "outputs must be real",
            where="model output",
            got=logits.dtype,
            remedy="Return real and imaginary parts (torch.view_as_real), or what the loss takes",
        )
    if not logits.is_floating_point():
        raise InvalidType(
            "outputs must be floating-point numbers",
            where="model output",
            got=logits.dtype,
            remedy="Return scores or means before argmax, rounding or comparison: they have "
            "gradients",
        )
    return logits


#: Norms whose backward pass on the CPU mistakes gradients in another order, for a batch of one.
BY_CHANNEL = {F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm}
#: All norms.
NORMS = BY_CHANNEL | {
    F.group_norm,
    torch.group_norm,
    F.layer_norm,
    torch.layer_norm,
    F.rms_norm,
    torch.rms_norm,
}


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
        if func in BY_CHANNEL and output.requires_grad:
            with torch._C.DisableTorchFunction():  # modes need not see this
                last = output.is_contiguous(memory_format=torch.channels_last)
            order = torch.channels_last if last and output.ndim == 4 else torch.contiguous_format
            output.register_hook(partial(_in_order, order))
        return output


def _in_order(order: torch.memory_format, gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=order)
