"""A fitted Laplace posterior as tensors and plain data, readable with `weights_only=True`."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.gradients.groups import SUBSETS
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.gradients.subnetwork import Subnetwork
from kfac_laplace.curvature.model.fingerprint import (
    Weights,
    check_shapes,
    check_values,
    check_weights_word,
    differing,
)
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidType, InvalidValue, KfacLaplaceError
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.predict.scaling import AUTO, TEMPERATURES, Scaling
from kfac_laplace.posterior.prior import Prior, checked_mean
from kfac_laplace.posterior.sharing import resolve_sharing
from kfac_laplace.states.plain import check_seal, same
from kfac_laplace.states.stored import REMEDY, Stored, opened, refusing_damage, shown

#: What the state of a posterior holds beside its format and its checksum.
KEYS = (
    "options",
    "curvature",
    "mode",
    "sharing",
    "hyperparameters",
    "posterior_scale",
)
#: What was added to it later, in two steps, and what a file without has.
LATER: tuple[dict[str, Any], ...] = (
    {
        "predictive_temperature": torch.ones((), dtype=torch.float64, device="cpu"),
        "scale_source": "older",
        "temperature_source": "default",
    },
    {"model": None},
)
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
CHOSEN = (
    "seed",
    "factor_dtype",
    "memory_budget",
    "offload",
    "process_group",
    "forward_fn",
    "batch_fn",
    "dict_key_y",
)
#: Options of a posterior that are not its curvature's.
OWN = ("prior_structure", "prior_mean", "dict_key_y")
#: What stands for objects of a user's own while the stored options around them are checked.
STANDING_IN = {"likelihood": "regression", "fisher": "exact", "prior_structure": "layerwise"}


@dataclass(frozen=True)
class Restored:
    """What a state holds, read and checked.

    Args:
        curvature: of the model.
        mode: θ* by parameter name, float64.
        hyperparameters: δ, σ and T.
        sharing: digest of the sharing of precisions.
        scaling: κ and τ.
    """

    curvature: Curvature
    mode: dict[str, Tensor]
    hyperparameters: Hyperparameters
    sharing: str
    scaling: Scaling


def restored(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    options: CurvatureOptions,
    own: Mapping[str, Any],
    remedy: str,
    weights: Weights = "check",
) -> Restored:
    """The content of a state for a model that holds the weights of the fit.

    Args:
        state_dict: the state.
        model: the network.
        options: of its curvature.
        own: all options of the reader as plain data.
        remedy: for options other than the stored ones.
        weights: "ignore" where the model may hold others.

    Raises:
        InvalidValue: a state of another kind, of other options or weights, or a damaged one.
    """
    check_weights_word(weights)
    with refusing_damage():
        found = opened(state_dict, KEYS, "a Laplace posterior", *LATER)
        check_options(found["options"], own, remedy)
        marks, network = found["model"], Network.of(model, options.likelihood)
        if marks.value is not None:
            check_shapes(marks, network.model)
        curvature = Curvature.from_state(found["curvature"].value, model, options)
        if not curvature.blocks:
            raise found["curvature"].fault("a posterior needs data", "a curvature of none")
        likelihood, device = curvature.likelihood, curvature.network.device
        mode = mode_from_state(found["mode"], curvature.ggn.knowledge.shapes, device)
        hyper = hyperparameters_from_state(found["hyperparameters"], likelihood, device)
        scaling = scaling_from_state(found, likelihood, device)
        sharing = found["sharing"].text()
        check_seal(state_dict, "state")
    if weights == "check":
        check_weights(network, mode)
        if marks.value is not None:
            check_values(marks, network.model, mode)
    return Restored(curvature, mode, hyper, sharing, scaling)


def options_from_state(stored: Stored, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a posterior as keywords, from plain data.

    Args:
        stored: all options, as a state holds them.
        overrides: keywords that count instead.

    Raises:
        InvalidValue: options that no posterior of this version has, or an object of the user's own,
            which only `overrides` can give.
    """
    plain = {name: option.value for name, option in _options(stored).items()}
    for name, value in plain.items():
        if name not in overrides and _is_own(name, value):
            raise InvalidValue(
                "an object of your own is not stored in the file",
                where=name,
                remedy=f"Pass it: Laplace.load(path, model, {name}=...)",
            )
    _check_alone(stored.where, plain)
    given = {name: value for name, value in plain.items() if name in OWN} | dict(overrides)
    return CurvatureOptions.from_plain(plain, given)


def _options(stored: Stored) -> dict[str, Stored]:
    """All options that there are, by name."""
    return stored.fields((*CurvatureOptions.stored_names(), *OWN))


def _is_own(name: str, value: object) -> bool:
    """Whether plain data say that there was an object or a function of the user's own."""
    if name in STANDING_IN:
        return value is None
    return name in ("forward_fn", "batch_fn") and value is not None


def _check_alone(where: str, plain: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` unless the stored options are some, whatever overrides say."""
    own = {name: STANDING_IN.get(name) for name, value in plain.items() if _is_own(name, value)}
    structure: Any = own.pop("prior_structure", plain["prior_structure"])
    try:
        CurvatureOptions.of(**CurvatureOptions.from_plain(plain, own))
        resolve_sharing(structure)
        checked_mean(plain["prior_mean"])
        Stored(plain["dict_key_y"], "dict_key_y").text()
        subset = Stored(plain["subset_of_weights"], "subset_of_weights")
        if isinstance(subset.value, Tensor):
            Subnetwork.of(subset.value)
        elif isinstance(subset.value, str):
            subset.text(SUBSETS)
        else:
            subset.texts()
    except Exception as error:  # whatever a damaged value does to a check
        raise InvalidValue(
            "the state holds an option that there is not here",
            where=where,
            got=f"{error}".replace(f". {REMEDY}", "")
            if isinstance(error, KfacLaplaceError)
            else shown(error),
            remedy=REMEDY,
        ) from error


def keywords_of(classes: Iterable[type]) -> set[str]:
    """Names of the arguments of constructors, of which each hands its `**keywords` to the next."""
    named = {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
    makers = [vars(kind)["__init__"] for kind in classes if "__init__" in vars(kind)]
    given = [p for make in makers for p in signature(make).parameters.values()]
    return {p.name for p in given if p.kind in named}


def check_names(overrides: Iterable[str], known: Collection[str]) -> None:
    """Raise `InvalidType` for what is no option, `InvalidValue` for the file's hyperparameters."""
    held = {*Hyperparameters.rows(), "posterior_scale", "predictive_temperature"}
    choice = sorted({*known} - held)
    for name in overrides:
        if name in held:
            raise InvalidValue(
                "the file holds this already",
                where=name,
                got="an override",
                remedy=f"Set it after loading: la = Laplace.load(path, model); la.{name} = value",
            )
        if name not in known:
            alike = difflib.get_close_matches(name, known, 1)
            raise InvalidType(
                "no such keyword",
                where="Laplace.load",
                got=repr(name),
                remedy=f"Perhaps {alike[0]} was meant" if alike else f"Choose from {choice}",
            )


def check_same_sharing(prior: Prior, digest: str) -> None:
    """Raise `InvalidValue` unless a prior shares precisions as the stored one did."""
    if prior.digest != digest:
        raise InvalidValue(
            "the state was made with another sharing of precisions",
            where="prior_structure",
            got=repr(prior.sharing),
            remedy="Pass the sharing that the state was made with",
        )


def _in_order(value: Any) -> Any:
    """Plain data in which the order of mappings counts, as that of patterns does."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return [(key, _in_order(inner)) for key, inner in value.items()]
    return value


def check_options(stored: Stored, own: Mapping[str, Any], remedy: str) -> None:
    """Raise `InvalidValue` where stored options contradict those of the reader.

    Args:
        stored: options as a state holds them.
        own: the reader's, as plain data.
        remedy: what to do about another one.
    """
    found = _options(stored)
    for name in BINDING:
        mine, theirs = own.get(name), found[name].value
        if not same(_in_order(mine), _in_order(theirs)):
            raise InvalidValue(
                "the state was made with another option",
                where=name,
                got=f"{shown(theirs)} stored, {shown(mine)} here",
                remedy=remedy,
            )


def hyperparameters_from_state(
    stored: Stored, likelihood: Likelihood, device: torch.device
) -> Hyperparameters:
    """δ, σ and T of a state.

    Raises:
        InvalidValue: not such values, or a noise that the likelihood does not have.
    """
    rows = Hyperparameters.rows()
    values = stored.fields(rows)
    for name, value in values.items():
        value.tensor(None if name == "prior_precision" else ())
        if not rows[name].belongs(likelihood) and float(value.value) != 1:
            raise value.fault("this likelihood has no such hyperparameter")
    return Hyperparameters.from_state({name: v.tensor() for name, v in values.items()}, device)


def scaling_to_plain(scaling: Scaling) -> dict[str, Any]:
    """κ, τ and where they come from."""
    return {
        "posterior_scale": scaling.scale,
        "predictive_temperature": scaling.temperature,
        "scale_source": scaling.source,
        "temperature_source": scaling.temperature_source,
    }


def scaling_from_state(
    found: Mapping[str, Stored], likelihood: Likelihood, device: torch.device
) -> Scaling:
    """κ, τ and where they come from, of a state.

    Raises:
        InvalidValue: below zero, not positive, or a temperature of what has no logits.
    """
    scale, tau = found["posterior_scale"], found["predictive_temperature"]
    kappa, temperature = scale.tensor(()), tau.tensor(())
    if float(kappa) < 0:
        raise scale.fault("must be ≥ 0", float(kappa))
    if float(temperature) <= 0 or (float(temperature) != 1 and not likelihood.has_logits):
        raise tau.fault("must be above 0, and 1 without logits", float(temperature))
    source = found["scale_source"].text((*AUTO,))
    if source == "older" and float(kappa) == 1:
        source = "default"
    kappa, temperature = (v.to(device, torch.float64) for v in (kappa, temperature))
    return Scaling(kappa, temperature, source, found["temperature_source"].text(TEMPERATURES))


def mode_from_state(
    stored: Stored, shapes: Mapping[str, torch.Size], device: torch.device
) -> dict[str, Tensor]:
    """θ* of a state by name, float64, for parameters of these shapes."""
    found = stored.fields(shapes)
    return {name: found[name].tensor(shape).to(device) for name, shape in shapes.items()}


def check_weights(network: Network, mode: Mapping[str, Tensor]) -> None:
    """Raise `InvalidValue` if the model's weights are not those of the fit."""
    live = network.parameters(tuple(mode))
    for name, value in mode.items():
        if not torch.equal(live[name].detach().to(value), value):
            raise differing(name)
