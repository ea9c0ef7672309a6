"""laplace-torch's arguments of `optimize_prior_precision`, checked and told in this library's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args

import torch

from kfac_laplace.errors import InvalidType
from kfac_laplace.likelihoods.links import LINKS
from kfac_laplace.options import check_choice, check_positive, check_whole

Method = Literal["marglik", "mackay", "gridsearch"]
METHODS: tuple[Method, ...] = get_args(Method)
#: Where laplace-torch's grid lies, and how fine it is.
GRID = {
    "log_prior_prec_min": -4.0,
    "log_prior_prec_max": 4.0,
    "grid_size": 100,
    "log_prior_prec_base": 10.0,
}
PREDICTIONS = ("glm", "linear", "nn")


def plain(value: Any) -> Any:
    """The word that an enumeration's member stands for; anything else as it is."""
    return value.value if isinstance(value, Enum) else value


@dataclass(frozen=True)
class PriorSearch:
    """What a call of `optimize_prior_precision` asks for.

    Args:
        method: "marglik", "mackay" or "gridsearch".
        grid: candidates of a grid search.
        link: by which its predictions are scored; "auto" is that of predictions.
    """

    method: str
    grid: Iterable[float] | None = None
    link: str = "auto"

    @classmethod
    def of(
        cls, pred_type: Any, method: Any, link: Any, grid: Any, theirs: Mapping[str, Any]
    ) -> "PriorSearch":
        """A call's arguments.

        Args:
            pred_type: how predictions will be made; the method where it is one, as in
                `optimize_prior("marglik")`.
            method: how δ is chosen.
            link: None, or a link.
            grid: None, or candidates.
            theirs: the entries of `GRID`, None where they were not given.

        Raises:
            InvalidType: a prediction that a grid search does not score, or arguments that
                contradict each other.
            InvalidValue: an unknown method, or an end of the grid that is none.
        """
        pred_type, method, link = plain(pred_type), plain(method), plain(link)
        if pred_type in METHODS:
            pred_type, method = "glm", pred_type
        check_choice("method", method, METHODS)
        check_choice("pred_type", pred_type, PREDICTIONS)
        given = [name for name, value in theirs.items() if value is not None]
        if method != "gridsearch":
            if given or grid is not None:
                raise InvalidType(
                    "a grid belongs to method='gridsearch'",
                    where=", ".join(given) or "grid",
                    got=f"method='{method}'",
                    remedy="Leave it out: the search has no bounds of its own",
                )
            return cls(method)
        if given and grid is not None:
            raise InvalidType(
                "says the same as grid",
                where=", ".join(given),
                got=repr(grid),
                remedy="Pass one of the two",
            )
        if pred_type != "glm":
            raise InvalidType(
                "the grid search scores linearised predictions",
                where="pred_type",
                got=repr(pred_type),
                remedy="Pass pred_type='glm', or a function of the posterior to "
                "optimize_prior(objective=...)",
            )
        if link is not None:
            check_choice("link_approx", link, LINKS)
        if link in ("mc", "mode"):
            why = (
                "averages are taken at fixed points" if link == "mc" else "it does not depend on δ"
            )
            raise InvalidType(
                f"the grid search does not score this link: {why}",
                where="link_approx",
                got=repr(link),
                remedy="Pass link_approx='auto', an average over the same Gaussian",
            )
        return cls(method, _grid(theirs) if grid is None else grid, link or "auto")


def _grid(theirs: Mapping[str, Any]) -> tuple[float, ...]:
    """The candidates of laplace-torch's words."""
    found = {
        name: default if theirs[name] is None else theirs[name] for name, default in GRID.items()
    }
    check_whole("grid_size", found["grid_size"], 1)
    base = found["log_prior_prec_base"]
    check_positive("log_prior_prec_base", base)
    ends = (float(found["log_prior_prec_min"]), float(found["log_prior_prec_max"]))
    exponents = torch.linspace(*ends, int(found["grid_size"]), dtype=torch.float64, device="cpu")
    return tuple((float(base) ** exponents).tolist())


def refuse(**words: Any) -> None:
    """Raise `InvalidType` for words of laplace-torch that mean nothing here, where given."""
    for name, value in words.items():
        if value is not None:
            raise InvalidType(
                REFUSED[name][0], where=name, got=repr(value), remedy=REFUSED[name][1]
            )


REFUSED = {
    "lr": (
        "the search finds its own step lengths",
        "Leave it out; n_steps and tolerance say when it ends",
    ),
    "loss": (
        "a grid search scores the NLL of its predictions",
        "Leave it out, or pass a function of the posterior to optimize_prior(objective=...)",
    ),
}
