"""A fitted Laplace posterior as tensors and plain data, readable with `weights_only=True`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.errors import InvalidValue, KfacLaplaceError
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.prior import Prior

FORMAT = 4
KEYS = {
    "format",
    "options",
    "curvature",
    "mode",
    "sharing",
    "hyperparameters",
    "posterior_scale",
}


def check_state(state: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` unless the state is one of ours."""
    if not isinstance(state, Mapping) or KEYS - set(state):
        raise InvalidValue(
            "not the state of a Laplace posterior",
            where="state",
            remedy="Pass what state_dict() or save() made",
        )
    if state["format"] != FORMAT:
        raise InvalidValue(
            "unknown format",
            where="state",
            got=state["format"],
            remedy=f"This version reads format {FORMAT}",
        )


def prior_options(plain: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a posterior that are not its curvature's, as keywords from plain data.

    Raises:
        InvalidValue: a prior structure of the user's own, which only `overrides` can give.
    """
    names = ("prior_structure", "prior_mean", "dict_key_y")
    found = {name: overrides.get(name, plain[name]) for name in names}
    if found["prior_structure"] is None:
        raise InvalidValue(
            "an object of your own is not stored in the file",
            where="prior_structure",
            remedy="Pass it: Laplace.load(path, model, prior_structure=...)",
        )
    return found


#: Options on which stored blocks and evidence depend.
BINDING = (
    "hessian_structure",
    "joint_bias",
    "kfac_approx",
    "fisher",
    "subset_of_weights",
    "uncovered",
    "class_axis",
    "prior_structure",
    "prior_mean",
    "likelihood",
)
#: Options that a file has no say in, and a reader may choose.
CHOSEN = ("seed", "factor_dtype", "memory_budget", "forward_fn", "batch_fn", "dict_key_y")


def check_same_sharing(prior: Prior, digest: str) -> None:
    """Raise `InvalidValue` unless a prior shares precisions as the stored one did."""
    if prior.digest != digest:
        raise InvalidValue(
            "the state was made with another sharing of precisions",
            where="prior_structure",
            got=repr(prior.sharing),
            remedy="Pass the sharing that the state was made with",
        )


def check_overrides(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` for an override of what a file holds: it would contradict its numbers.

    Args:
        stored: options as plain data.
        overrides: keywords beside the file.
    """
    held = {name for name, value in stored.items() if value is not None} - set(CHOSEN)
    held |= Hyperparameters.rows().keys()
    for name in overrides:
        if name in held:
            raise InvalidValue(
                "the file holds this already",
                where=name,
                got=f"an override, {overrides[name]!r}",
                remedy="Leave it out; hyperparameters can be set afterwards, as in "
                "la.prior_precision = 2.0",
            )


def _in_order(value: Any) -> Any:
    """Plain data in which the order of mappings counts, as that of patterns does."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return [(key, _in_order(inner)) for key, inner in value.items()]
    return value


def check_options(stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` where stored options contradict those of the posterior that loads."""
    for name in BINDING:
        mine, theirs = own.get(name), stored.get(name)
        if _in_order(mine) != _in_order(theirs):
            raise InvalidValue(
                "the state was made with another option",
                where=name,
                got=f"{stored.get(name)!r} stored, {own.get(name)!r} here",
                remedy="Make it with the stored options, as Laplace.load does",
            )


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Turn what a damaged state does to its reader into `InvalidValue`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if isinstance(error, KfacLaplaceError):
            raise
        raise InvalidValue(
            "a damaged state", where="state", got=repr(error), remedy="Save it again"
        ) from error


def check_weights(network: Network, mode: Mapping[str, Tensor]) -> None:
    """Raise `InvalidValue` if the model's weights are not those of the fit."""
    live = network.parameters(tuple(mode))
    for name, value in mode.items():
        if not torch.equal(live[name].detach().to(value), value):
            raise InvalidValue(
                "the model's weights differ from those at the fit",
                where=name,
                remedy="Load the model's own state_dict of that time first",
            )
