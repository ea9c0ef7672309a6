"""Keywords of laplace-torch that mean nothing here: each is answered with the word to write."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.migration.prior_search import plain

#: A keyword, why it is none, and what to write.
Words = Mapping[str, tuple[str, str]]
Callee = TypeVar("Callee", bound=Callable[..., Any])

TRAINING: Words = {
    "backend": (
        "there is one curvature, and no backend to choose",
        "Leave it out where it is a GGN (fisher='exact'); fisher='empirical' is what an EF is. "
        "laplace-torch itself takes kfac_laplace.integrations.laplace_torch.KfacGGN as its backend",
    ),
    "enable_backprop": (
        "it belongs to a call, not to the posterior",
        "Leave it out here, and write la(x, enable_backprop=True), as predict and "
        "functional_samples have it",
    ),
    "dict_key_x": (
        "nothing has to be told of inputs: the mapping goes to the model without its targets, by "
        "keyword or as a whole",
        "Leave it out; forward_fn=lambda model, x: ... hands over anything else",
    ),
}

CONSTRUCTOR: Words = {
    **TRAINING,
    "backend_kwargs": (
        "there is no backend to hand them to",
        "Leave it out; fisher='mc' or MonteCarlo(samples=...) is stochastic=True, and kfac_approx "
        "has its own keyword",
    ),
    "asdl_fisher_kwargs": (
        "there is no backend to hand them to",
        "Leave it out; fisher='mc' or MonteCarlo(samples=...) draws labels",
    ),
    "feature_reduction": (
        "the last layer is recorded where it is used, whatever its outputs go through afterwards",
        "Leave it out",
    ),
    "last_layer_name": (
        "layers are chosen by the names of their parameters",
        "Write subset_of_weights=['name.*'] for the layer of that name; 'last_layer' finds it",
    ),
}

FIT: Words = {
    "iterations": (
        "a fit is one pass over the data, and no optimisation",
        "Leave it out; optimize_prior moves the hyperparameters afterwards",
    ),
    "lr": ("a fit takes no steps", "Leave it out"),
}

CALL: Words = {
    "diagonal_output": (
        "predictions have the whole covariance of the outputs",
        "Take the diagonal of la.predict(x).covariance over its last two axes",
    ),
    "fitting": (
        "pairs are told from single inputs by the model's outputs",
        "Write la.predict(x).probs for the preferences within pairs",
    ),
}

DRAWS: Words = {
    "diagonal_output": (
        "draws are joint: of functions, each at all inputs and outputs",
        "Leave it out; la.predict(x).covariance has the variances",
    ),
    "joint": ("draws are joint: of functions, each at all inputs", "Leave it out"),
}

SEARCH: Words = {
    "n_samples": (
        "a grid search makes no draws",
        "Leave it out; link_approx='auto' averages over the same Gaussian at fixed points",
    )
}


def answering(words: Words) -> Callable[[Callee], Callee]:
    """Let some keywords be refused by an error that names the word to write.

    Args:
        words: the keywords.
    """

    def decorate(function: Callee) -> Callee:
        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            _no_process(keywords.get("hessian_structure"))
            for name, (what, remedy) in words.items():
                if name in keywords:
                    got = keywords[name]
                    shown = got.__name__ if isinstance(got, type) else repr(got)
                    raise InvalidType(what, where=name, got=shown, remedy=remedy)
            return function(*args, **keywords)

        return checked  # type: ignore[return-value]

    return decorate


def _no_process(structure: Any) -> None:
    """Raise `InvalidValue` for laplace-torch's posteriors over functions."""
    if isinstance(structure, str) and plain(structure) == "gp":
        raise InvalidValue(
            "the posterior is over weights: linearised predictions are its Gaussian process",
            where="hessian_structure",
            got="'gp'",
            remedy="Fit hessian_structure=LowRank(rank=points · outputs) on a subset of the data, "
            "or 'kron' on all",
        )
