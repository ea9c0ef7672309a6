"""Leaving the caller's model as it was: modes, random states, graphs, inference tensors."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_laplace.curvature.model.kept import Kept
from kfac_laplace.errors import InvalidType, UnsupportedUse
from kfac_laplace.process import TURNS, Shared, draws_kept


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers, checked to be one we can record.

    Raises:
        InvalidType: `model` is no module.
        UnsupportedUse: a scripted or compiled sub-module, or parameters on several devices.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType("not a torch.nn.Module", where="model", got=type(model).__name__)
    model = unwrapped(model)
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; modes and global random states are put back after.

    So is what modules held, where they keep a graph of what ran inside. Other threads wait for
    their turn with the model, and with all that share a module with it.
    """
    with in_turn(model), _PLAIN_ATTENTION.entered():
        kept = Kept(model)
        modes = {module: module.training for module in model.modules()}
        stand_ins = _StandIns(model)
        try:
            evaluate_afresh(model)
            with draws_kept(device_of(model)), torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            _restore_modes(model, modes)
            stand_ins.take_out()
            kept.put_back()  # after `train`, in which many forget what they kept


def in_turn(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which no other thread passes through this model by ours.

    What a pass sets in a module is there for all to see: modes, and other tensors in place of
    parameters.
    """
    return TURNS.of(map(id, model.modules()))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by name, none of them one that stands in for a pass."""
    with in_turn(model):
        return dict(model.named_parameters())


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by plain operations, in the whole process.

    The fused attention of evaluation mode has no derivative. Fused kernels leave rounding noise
    where gradients are zero, so that chance would decide which positions count, and they have no
    forward-mode derivative.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


_PLAIN_ATTENTION = Shared(_plain_attention)


class _StandIns:
    """Copies in place of a model's buffers that were made in inference mode.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        copies: dict[int, Tensor] = {}
        self._slots = [
            (module._buffers, key, buffer, copies.setdefault(id(buffer), outside_inference(buffer)))
            for module in model.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and buffer.is_inference()
        ]
        for buffers, key, _, copy in self._slots:
            buffers[key] = copy

    def take_out(self) -> None:
        """Put the buffers back, but for those that the model has replaced."""
        for buffers, key, buffer, copy in self._slots:
            if buffers.get(key) is copy:
                buffers[key] = buffer


def evaluate_afresh(model: nn.Module) -> None:
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


def outside_inference(tensor: Tensor) -> Tensor:
    """A tensor that a backward pass may save: a copy of one made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
