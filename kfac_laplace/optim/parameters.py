"""The optimiser's parameter groups: parameters of the model, and options that are known."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from kfac_laplace.errors import InvalidType, InvalidValue

#: What a group may set for its parameters.
OPTIONS = ("lr", "weight_decay", "kfac")


def parameter_groups(model: nn.Module, params: Any) -> list[dict[str, Any]]:
    """Groups as torch takes them, checked.

    Args:
        model: the model.
        params: None for all parameters of the model; tensors, pairs (name, tensor), or mappings
            with "params" and options.

    Raises:
        InvalidValue: a tensor that is no parameter of the model, or an unknown option.
        InvalidType: something else than tensors.
    """
    if params is None:
        return [{"params": list(model.parameters())}]
    given = list(params)
    groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    names = {id(p): name for name, p in model.named_parameters()}
    checked = []
    for group in groups:
        own = group["params"]
        own = [own] if isinstance(own, Tensor) else [_tensor(p) for p in own]
        for p in own:
            if id(p) not in names:
                raise InvalidValue(
                    "not a parameter of the model",
                    where="params",
                    got=f"a tensor {tuple(p.shape)}",
                    remedy="Pass parameters of the module itself, whose layers are to be seen",
                )
        if unknown := group.keys() - {"params", *OPTIONS}:
            raise InvalidValue(
                "unknown option of a parameter group",
                where="params",
                got=", ".join(map(repr, sorted(unknown))),
                remedy=f"Choose from {', '.join(OPTIONS)}",
            )
        checked.append({**group, "params": own})
    return checked


def _tensor(param: Any) -> Tensor:
    """A parameter, also of a pair with its name."""
    found = param[1] if isinstance(param, tuple) and len(param) == 2 else param
    if not isinstance(found, Tensor):
        raise InvalidType("not a parameter", where="params", got=type(found).__name__)
    return found


def check_numbers(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InvalidValue` unless learning rates and weight decays are finite and not negative."""
    for group in groups:
        for name in ("lr", "weight_decay"):
            value = group[name]
            if isinstance(value, bool) or not isinstance(value, Real | Tensor):
                raise InvalidType("not a number", where=name, got=repr(value))
            if not 0 <= float(value) < float("inf"):
                raise InvalidValue("must be finite and not negative", where=name, got=float(value))
        if not isinstance(group["kfac"], bool):
            raise InvalidType("neither True nor False", where="kfac", got=repr(group["kfac"]))
