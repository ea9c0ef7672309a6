"""A fitted Laplace posterior as tensors and plain data, readable with `weights_only=True`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kfac_laplace import likelihoods
from kfac_laplace.curvature.estimate import fisher as fishers
from kfac_laplace.curvature.ggn import Curvature
from kfac_laplace.errors import InvalidValue, KfacLaplaceError

FORMAT = 3


#: Options that are functions, of which files only say whether they were given.
FUNCTIONS = ("forward_fn", "batch_fn")
GIVEN = "given"


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor options as plain data; objects that have no name become None."""
    plain = dict(options)
    likelihood = likelihoods.resolve(options["likelihood"])
    name = _name_of(likelihood, likelihoods.NAMED)
    plain["likelihood"] = None if name is None else [name, likelihood.options()]
    fisher = fishers.resolve(options["fisher"])
    name = _name_of(fisher, fishers.NAMED)
    plain["fisher"] = None if name is None else [name, asdict(fisher)]  # type: ignore[call-overload]
    if not isinstance(options["kfac_approx"], str):
        plain["kfac_approx"] = dict(options["kfac_approx"])
    if not isinstance(options["subset_of_weights"], str):
        plain["subset_of_weights"] = list(options["subset_of_weights"])
    for name in FUNCTIONS:
        plain[name] = None if options[name] is None else GIVEN
    return plain


def options_from_plain(plain: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor options from plain data.

    Raises:
        InvalidValue: a likelihood, estimator or function of the user's own, which only `overrides`
            can give.
    """
    options = {**plain, **overrides}
    objects = ("likelihood", "fisher", "prior_structure")
    missing = [name for name in objects if options[name] is None]
    for name in (*missing, *(name for name in FUNCTIONS if options[name] == GIVEN)):
        raise InvalidValue(
            "an object of your own is not stored in the file",
            where=name,
            remedy=f"Pass it: Laplace.load(path, model, {name}=...)",
        )
    if isinstance(options["likelihood"], list):
        kind, fields = options["likelihood"]
        options["likelihood"] = likelihoods.NAMED[kind](**fields)
    if isinstance(options["fisher"], list):
        kind, fields = options["fisher"]
        options["fisher"] = fishers.NAMED[kind](**fields)
    return options


def _name_of(value: object, named: Mapping[str, type]) -> str | None:
    return next((name for name, kind in named.items() if type(value) is kind), None)


def check_state(state: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` unless the state is one of ours."""
    keys = {"format", "options", "curvature", "mode", "hyperparameters", "posterior_scale"}
    if not isinstance(state, Mapping) or keys - set(state):
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


#: Options on which stored blocks and evidence depend.
BINDING = ("hessian_structure", "joint_bias", "prior_structure", "prior_mean", "likelihood")


def check_options(stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` where stored options contradict those of the posterior that loads."""
    for name in BINDING:
        mine, theirs = own.get(name), stored.get(name)
        mine, theirs = (v.tolist() if isinstance(v, Tensor) else v for v in (mine, theirs))
        if mine != theirs:
            raise InvalidValue(
                "the state was made with another option",
                where=name,
                got=f"{stored.get(name)!r} stored, {own.get(name)!r} here",
                remedy="Use Laplace.load, which takes the stored options",
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


def check_weights(curvature: Curvature, mode: Mapping[str, Tensor]) -> None:
    """Raise `InvalidValue` if the model's weights are not those of the fit."""
    live = curvature.network.live_parameters()
    for name, value in mode.items():
        if not torch.equal(live[name].detach().to(value), value):
            raise InvalidValue(
                "the model's weights differ from those at the fit",
                where=name,
                remedy="Load the model's own state_dict of that time first",
            )
