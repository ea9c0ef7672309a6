"""By what a model is known again: names, shapes and SHA-256 of its parameters and buffers."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.model.unchanged import parameters_of
from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_choice
from kfac_laplace.states.stored import Stored

#: Whether values have to be those of the fit, or names and shapes alone.
Weights = Literal["check", "ignore"]
#: So many entries are hashed at a time.
ENTRIES = 2**20
#: Whole numbers by size in bytes.
_WHOLES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_weights_word(weights: str) -> None:
    """Raise `InvalidValue` for a word that says nothing of weights."""
    check_choice("weights", weights, get_args(Weights))


def fingerprint(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Shape and hash of each parameter and each buffer that a model's own state holds, by name.

    Hashes are of values in float64 (integers in int64, complex numbers as pairs), so that a model
    in another precision that holds the same values is the same.

    Args:
        model: unwrapped.
        values: of some parameters, in place of what the model holds now.
    """
    return {
        name: {"shape": list(tensor.shape), "sha256": _digest(values.get(name, tensor))}
        for name, tensor in _tensors(model)
    }


def bit_sums(model: nn.Module) -> dict[str, int]:
    """Sum of the bits of each parameter and buffer, read as whole numbers, by name.

    Far cheaper than hashes, and made on the device: it tells whether two processes have the same
    values, where nobody means to deceive.

    Args:
        model: unwrapped.
    """
    return {name: _bit_sum(tensor.detach()) for name, tensor in _tensors(model)}


def check_shapes(stored: Stored, model: nn.Module) -> None:
    """Raise `InvalidValue` at the first tensor with another name or shape, in the model's order.

    Args:
        stored: the fingerprint of a state.
        model: unwrapped.
    """
    told, left = stored.items(), {*stored.items()}
    for name, tensor in _tensors(model):
        if name not in told:
            raise _other(name, "the state's model has no such tensor", tuple(tensor.shape))
        left.remove(name)
        shape = told[name].fields(("shape", "sha256"))["shape"].wholes()
        if shape != tensor.shape:
            raise _other(
                name,
                "the model has another shape than at the fit",
                f"{tuple(tensor.shape)}, where it was {shape}",
            )
    for name in told:
        if name in left:
            raise _other(name, "the model has no such tensor, which the state's had", None)


def check_values(stored: Stored, model: nn.Module, known: Collection[str]) -> None:
    """Raise `InvalidValue` at the first tensor with other values, in the model's order.

    Args:
        stored: the fingerprint of a state, with the names of the model.
        model: unwrapped.
        known: names of those that need no look.
    """
    told = stored.items()
    for name, tensor in _tensors(model):
        if name not in known and told[name].items()["sha256"].text() != _digest(tensor):
            raise differing(name)


def differing(name: str) -> InvalidValue:
    """The error about values that are not those of the fit."""
    return InvalidValue(
        "the model's weights differ from those at the fit",
        where=name,
        remedy="Load the model's own state_dict of that time first, or pass weights='ignore' for a "
        "posterior around the stored mean in this model",
    )


def _other(name: str, what: str, got: object) -> InvalidValue:
    return InvalidValue(
        what, where=name, got=got, remedy="Pass another model, or one made as it was for the fit"
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers that a model's own state holds; each once, tied or not."""
    yield from parameters_of(model).items()
    kept = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def _bit_sum(tensor: Tensor) -> int:
    """The bits of all entries as whole numbers, summed modulo 2⁶⁴."""
    whole = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = whole.resolve_neg().flatten()
    if flat.is_floating_point():
        flat = flat.view(_WHOLES[flat.element_size()])
    return int(flat.sum(dtype=torch.int64))


def _digest(tensor: Tensor) -> str:
    """SHA-256 of shape and values."""
    found = hashlib.sha256(f"{tuple(tensor.shape)};".encode())
    with torch.no_grad():
        whole = tensor.detach()
        whole = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole
        wide = torch.float64 if whole.is_floating_point() else torch.int64
        for part in whole.reshape(-1).split(ENTRIES):
            found.update(part.cpu().to(wide).contiguous().numpy())
    return found.hexdigest()
