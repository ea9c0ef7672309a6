"""An evidence as a report: its value, what brackets it, and what the data determine."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.expansion import Expansion
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.dual import DualEvidence
from kfac_laplace.posterior.objectives.evidence import log_marginal_likelihood
from kfac_laplace.posterior.objectives.registry import (
    AnyObjective,
    Data,
    DataObjective,
    on_data,
    resolve_objective,
)
from kfac_laplace.posterior.sharing import Diagonal, Layerwise, Sharing


@dataclass(frozen=True)
class Evidence:
    """log q(D), in nats over the whole data; parameters without effect have no part in it.

    Args:
        value: float64, shape ().
        lower: what it is not below, in the same units; None where nothing brackets it. It rests on
            an upper bound of the log-determinant, which always holds.
        upper: what it is not above, in expectation over the columns that were drawn.
        standard_error: of the value over its own draws; None where there are none.
        effective_dimensions: γ, the directions that the data determine, by name of the group.
        constant: evidence of the constant predictor with the best outputs (and σ), the least that
            an evidence to be trusted exceeds; NaN where the likelihood has none.
    """

    value: Tensor
    lower: Tensor | None
    upper: Tensor | None
    standard_error: Tensor | None
    effective_dimensions: dict[str, float]
    constant: Tensor


def evidence_of(posterior: Posterior, choice: str | AnyObjective, data: Data) -> Evidence:
    """The evidence of a posterior at its hyperparameters, as an objective estimates it.

    Args:
        posterior: the fitted one.
        choice: "kron", "exact", "columns" or "bounds", or an object such as `Columns(each=4)`.
        data: its training data, which all but "kron" look at once more.

    Raises:
        InvalidValue: an objective that is no evidence.
    """
    objective = resolve_objective(choice)
    own = objective is log_marginal_likelihood
    if not own and not (isinstance(objective, DataObjective) and objective.evidence):
        raise InvalidValue(
            "this objective is no evidence",
            where="objective",
            got=repr(choice),
            remedy="Name one: 'kron', 'exact', 'columns' or 'bounds'",
        )
    with torch.no_grad():
        separate = _with_own_precisions(posterior.apart_from_unused)
        goal = on_data(objective, separate, data)
        lower = upper = None
        if isinstance(goal, DualEvidence):
            gamma = goal.effective_dimensions(separate)
            lower, upper = goal.bracket(separate)
        else:
            gamma = separate.effective_dimensions()
        ggn, temperature = posterior.ggn, posterior.hyperparameters.temperature.detach()
        constant = ggn.likelihood.constant_log_likelihood(ggn.targets) / temperature
        index = separate.prior.index.items()
        by_group = {name: float(gamma[places.flatten().unique()].sum()) for name, places in index}
        return Evidence(goal(separate).detach(), lower, upper, None, by_group, constant)


def _with_own_precisions(posterior: Posterior) -> Posterior:
    """The same prior with a precision for each group, or each entry: γ is then known by group."""
    prior, hyper = posterior.prior, posterior.hyperparameters.detached()
    sharing: Sharing
    if prior.constant_on_blocks:
        sharing, delta = Layerwise(), prior.by_block(hyper.prior_precision)
    else:
        sharing = Diagonal()
        by_group = prior.by_group(hyper.prior_precision)
        groups = prior.layouts.groups.items()
        spread = {name: by_group[name].expand(layout.matrix) for name, layout in groups}
        delta = prior.layouts.flatten(spread)
    expansion = Expansion(
        posterior.network, posterior.ggn, posterior.mode, replace(prior, sharing=sharing)
    )
    hyper = replace(hyper, prior_precision=delta)
    return replace(posterior, expansion=expansion, hyperparameters=hyper)
