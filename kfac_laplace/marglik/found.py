"""What a round of the tuner goes on from, with a pass over the data or without."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.fisher import Hybrid
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue
from kfac_laplace.laplace import Laplace
from kfac_laplace.marglik.loss import constant_unexplained
from kfac_laplace.marglik.progress import Progress
from kfac_laplace.marglik.sample import first_kept
from kfac_laplace.marglik.shared import EpochFit, last_pass, settings_claim, shared_ggn
from kfac_laplace.marglik.standing import Setup, Standing
from kfac_laplace.posterior.claims import Claim
from kfac_laplace.posterior.expansion import Expansion, mode_of
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives import Data

#: Outputs of an example up to which rounds take the exact curvature.
FEW_OUTPUTS = 5


@dataclass(frozen=True)
class Found:
    """What a round goes on from.

    Args:
        posterior: at today's hyperparameters.
        standing: the tuner's, in the groups of the posterior.
        constant: loss of the best constant prediction.
        data: the training data, without a loader where there was no pass.
        last_pass: what rounds without a pass will take from the last one.
        claims: what to say.
    """

    posterior: Posterior
    standing: Standing
    constant: float
    data: Data
    last_pass: GGN | None
    claims: tuple[Claim, ...] = ()


def by_a_pass(
    setup: Setup,
    standing: Standing,
    progress: Progress,
    loader: Iterable[Any],
    constant: float | None,
) -> Found:
    """By a pass over the data.

    Args:
        setup: of the tuner.
        standing: where it stands.
        progress: of training, after the epoch.
        loader: training data.
        constant: loss of the best constant prediction in the last round, None before the first.
    """
    seen, burn_in = first_kept(loader, setup.options), progress.burn_in
    # Another seed each round, so that Monte-Carlo labels are not the same ones again.
    options = setup.options.seeded(setup.options.seed + progress.epoch)
    if setup.signs and (progress.outputs or 0) > FEW_OUTPUTS:
        options = replace(options, fisher=Hybrid(passes=1))
    # What gradients are like before the network has learned says little of them later.
    decide = burn_in.waits and (constant is None or burn_in.judged(constant).over)
    la, standing = fitted(setup, standing, seen, options, decide=decide)
    examples = seen.few(setup.network, setup.key_y, setup.options)
    groups = replace(standing.groups, examples=examples, settings=la.curvature.settings)
    standing = replace(standing, groups=groups.looked_at(progress.modes))
    ggn, last = la.curvature.ggn, None
    if setup.optimizer is not None:
        last = last_pass(ggn, setup.optimizer, setup.options)
    data = Data((loader,), setup.key_y, options.seed)
    return Found(la.posterior, standing, constant_unexplained(ggn), data, last)


def by_averages(
    setup: Setup, standing: Standing, fit: EpochFit, last: GGN | None, constant: float | None
) -> Found:
    """By the curvature that the optimiser averages.

    Args:
        setup: of the tuner.
        standing: where it stands.
        fit: of the epoch.
        last: what the last round with a pass left, None before it.
        constant: loss of the best constant prediction then.

    Raises:
        InvalidValue: there is no such optimiser, or this round needs a pass.
        NotFitted: the optimiser has captured nothing yet.
    """
    if setup.optimizer is None:
        raise InvalidValue(
            "a round is due in this epoch",
            where="loader",
            got=None,
            remedy="Pass the training loader",
        )
    groups = standing.groups.today()
    if groups is not standing.groups or constant is None:  # other parameters or device
        last = None
    ggn = shared_ggn(setup.optimizer, last, groups.known, fit)
    assert groups.prior is not None and last is not None and constant is not None
    curvature = Curvature.of(groups.model, setup.options)
    curvature.ggn = ggn
    expansion = Expansion(curvature.network, ggn, mode_of(curvature), groups.prior)
    full = groups.prior.full(standing.hyper.prior_precision)
    posterior = Posterior(expansion, replace(standing.hyper, prior_precision=full))
    data, said = Data((), setup.key_y, setup.options.seed), settings_claim(ggn, last)
    return Found(posterior, standing, constant, data, last, tuple(said))


def fitted(
    setup: Setup,
    standing: Standing,
    loader: Iterable[Any],
    options: CurvatureOptions,
    decide: bool = False,
) -> tuple[Laplace, Standing]:
    """A posterior fitted at today's hyperparameters, and the tuner in its groups.

    Args:
        setup: of the tuner.
        standing: where it stands.
        loader: training data.
        options: of the curvature.
        decide: expand or reduce anew, whatever earlier rounds took.
    """
    now = standing.groups.today()
    now = replace(now, settings={}) if decide else now
    la = Laplace(
        now.model,
        options.likelihood,
        prior_precision=standing.before_a_fit(),
        sigma_noise=standing.hyper.sigma_noise,
        temperature=float(standing.hyper.temperature),
        **setup.fixed,
        **options.keywords(),
    )
    la.curvature = now.curvature(options)
    la.fit(loader)
    groups = replace(now, known=la.curvature.ggn.knowledge, prior=la.posterior.prior)
    if standing.groups.prior is None:
        return la, replace(standing, groups=groups)
    standing = standing.over(groups, setup)
    la.prior_precision = standing.hyper.prior_precision
    return la, standing
