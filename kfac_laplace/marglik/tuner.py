"""`MarglikTuner`: optimises hyperparameters by the Laplace evidence during training [ML21, Alg. 1].

The caller keeps the training loop. The tuner supplies the loss at today's hyperparameters and,
every few epochs, one curvature pass and some steps on log δ and log σ.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.blocks import Structure
from kfac_laplace.curvature.estimate.fisher import Hybrid
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.model.forward import Forward
from kfac_laplace.curvature.options import CurvatureKeywords, CurvatureOptions, spelled
from kfac_laplace.curvature.plain_groups import groups_to_plain, knowledge_of_groups
from kfac_laplace.curvature.state import settings_of
from kfac_laplace.errors import InvalidValue, NotFitted
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import Likelihood, settled_axis
from kfac_laplace.marglik.burn_in import BEGINNING, AtMost, BurnIn
from kfac_laplace.marglik.found import Found
from kfac_laplace.marglik.grouping import Grouping, difference
from kfac_laplace.marglik.live import LiveParameters, first_entries
from kfac_laplace.marglik.loss import (
    constant_unexplained,
    looked_at,
    mean_log_likelihood,
    output_and_target,
    statistic_of_batch,
    unexplained,
)
from kfac_laplace.marglik.record import Record, best_of, rounds_that_moved
from kfac_laplace.marglik.roles import Roles, Tune
from kfac_laplace.marglik.sample import Examples, KeepsFirst
from kfac_laplace.marglik.shared import (
    AveragesCurvature,
    EpochFit,
    check_shares,
    last_pass,
    settings_claim,
    shared_ggn,
)
from kfac_laplace.marglik.shared_state import (
    epoch_fit_from_plain,
    last_pass_from_plain,
    last_pass_to_plain,
)
from kfac_laplace.marglik.state import KEYS, LATER, check_goal, name_of, resumed, training_to_plain
from kfac_laplace.marglik.training_mode import modes_of
from kfac_laplace.options import check_choice, check_positive, check_whole
from kfac_laplace.posterior.bounds import Bounds
from kfac_laplace.posterior.carry import carried
from kfac_laplace.posterior.claims import round_claims, tell, waiting_claims
from kfac_laplace.posterior.expansion import Expansion, mode_of
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.mackay import check_objective, mackay_steps
from kfac_laplace.posterior.objectives import (
    AnyObjective,
    Data,
    Objective,
    on_data,
    resolve_objective,
)
from kfac_laplace.posterior.optimum import Search
from kfac_laplace.posterior.prior import (
    Given,
    checked_mean,
    starting_precision,
)
from kfac_laplace.posterior.sharing import PriorStructure, sharing_to_plain
from kfac_laplace.posterior.state import check_options, check_same_sharing
from kfac_laplace.posterior.steps import adam
from kfac_laplace.states.plain import check_seal, sealed
from kfac_laplace.states.stored import FORMAT, Stored, opened, refusing_damage

log = logging.getLogger("kfac_laplace")

METHODS = ("marglik", "mackay")
UNITS = ("nats", "residuals")
#: Outputs of an example up to which rounds take the exact curvature.
FEW_OUTPUTS = 5
#: How many rounds' steps the round takes in which hyperparameters leave their start.
AWAY = 5
STILL_WAITS = (
    "a posterior by the precisions of the start: in %d epochs the training loss has not settled. "
    "optimize_prior() chooses precisions for the weights as they are; n_epochs_burnin=k has the "
    "tuner move them from epoch k on"
)


class MarglikTuner:
    """Tunes prior precisions, and the noise of regression, by the evidence while you train.

    Args:
        model: the network in training; never changed, its mode and optimiser are the caller's. Give
            the optimiser no weight decay: the loss has the prior.
        likelihood: "classification" or another name of docs/likelihoods.md, or a `Likelihood`.
        n_data: number of training examples (of nodes, where each node has an output), by which the
            loss weighs the prior.
        prior_structure: how δ is shared; as for `Laplace`, with all its forms.
        prior_precision: initial δ; as for `Laplace`. Left out: 10⁻⁴ for each training example, a
            common weight decay, and at most 1.
        prior_mean: μ; as for `Laplace`.
        sigma_noise: initial σ, of likelihoods with a noise.
        temperature: T, the same in the loss and in the posterior.
        fix_sigma_noise: leave σ alone.
        fisher: as for `Laplace`. Left out: "exact", but that rounds take `Hybrid(passes=1)`, one
            backward pass with random signs, where an example has more than five outputs.
        kfac_approx: as for `Laplace`; so are hessian_structure, subset_of_weights, joint_bias,
            uncovered, seed, factor_dtype, memory_budget, dict_key_y, class_axis, forward_fn and
            batch_fn.
        n_epochs_burnin: no round before this epoch, counted from 1, and hyperparameters move from
            it on. 0: rounds from the first on, in which precisions stay until the training loss has
            settled, as far as `loss` was called with gradients on.
        marglik_frequency: a round in every epoch that is a multiple of it.
        n_hypersteps: steps in each round; five times as many in the one in which hyperparameters
            begin to move after the training loss has settled.
        lr_hyp: Adam's learning rate on log δ and log σ ("marglik").
        method: "marglik" for Adam on the objective, "mackay" for the evidence's fixed point.
        objective: what rounds maximise: "auto" or "kron" for the evidence, "exact", "columns" or
            "bounds" for that of the exact curvature, with a further pass over the loader, or a
            function of a `Posterior`. Records hold the evidence beside it.
        tune: which precisions are tuned: "auto" for those of the matrices of layers, where the
            evidence chooses well (`coverage` says which, and why not the others); "all"; or
            patterns of parameter names. The others stay at their initial value.
        curvature: a `kfac_laplace.optim.KFAC` of this model: `step()` without a loader makes a
            round from the curvature that it averages while it trains, without a pass over the data.
            The first round, and the next after parameters were frozen or unfrozen, takes a loader.
        loss_units: "nats", or "residuals" for the loss times σ² where the noise is Gaussian: its
            scale, to which optimisers such as Adam adapt slowly, does not move then as σ does.

    Raises:
        InvalidValue: an option out of range.
    """

    @spelled
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        n_data: int,
        *,
        prior_structure: PriorStructure = "layerwise",
        prior_precision: Given = BEGINNING,
        prior_mean: Given = 0.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        fix_sigma_noise: bool = False,
        hessian_structure: Structure = "kron",
        dict_key_y: str = "labels",
        n_epochs_burnin: int = 0,
        marglik_frequency: int = 1,
        n_hypersteps: int = 10,
        lr_hyp: float = 0.1,
        method: str = "marglik",
        objective: str | AnyObjective = "auto",
        tune: Tune = "auto",
        loss_units: str = "nats",
        curvature: AveragesCurvature | None = None,
        **options: Unpack[CurvatureKeywords],
    ):
        at_least = {
            "n_data": (n_data, 1),
            "n_epochs_burnin": (n_epochs_burnin, 0),
            "marglik_frequency": (marglik_frequency, 1),
            "n_hypersteps": (n_hypersteps, 1),
        }
        for name, (value, least) in at_least.items():
            check_whole(name, value, least)
        check_positive("lr_hyp", lr_hyp)
        check_choice("method", method, METHODS)
        check_choice("loss_units", loss_units, UNITS)
        self.objective = resolve_objective(objective)
        if method == "mackay":
            check_objective(self.objective)
        self.model = model
        self.n_data = n_data
        self.n_epochs_burnin, self.marglik_frequency = n_epochs_burnin, marglik_frequency
        self.n_hypersteps, self.lr_hyp, self.method = n_hypersteps, lr_hyp, method
        mean = checked_mean(prior_mean)
        self._fixed: dict[str, Any] = {
            "prior_structure": copy.deepcopy(prior_structure),
            "prior_mean": mean,
            "dict_key_y": dict_key_y,
        }
        blank = Laplace(
            model,
            likelihood,
            hessian_structure=hessian_structure,
            prior_precision=prior_precision,
            sigma_noise=sigma_noise,
            temperature=temperature,
            **self._fixed,
            **options,
        )
        self.options = blank.options
        self._signs = "fisher" not in options
        self._outputs: int | None = None  # of an example
        self.likelihood = blank.likelihood
        gaussian = self.likelihood.has_gaussian_noise
        self._in_residuals = loss_units == "residuals" and gaussian
        structure = self._fixed["prior_structure"]
        self._groups = Grouping.of(model, self.options, structure, mean, tune)
        self._network = blank.curvature.network
        self._penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
        self._live = LiveParameters(self._network.model, ())
        if isinstance(prior_precision, AtMost):
            prior_precision = prior_precision.start(n_data)
        delta, self._patterns = starting_precision(prior_precision, self._network.device)
        self._take(Hyperparameters(delta, blank.sigma_noise, blank.temperature))
        self._start = self._patterns or self._hyper.prior_precision, self._hyper.sigma_noise
        self._said: set[tuple[str, str]] = set()
        fixed = ("sigma_noise",) if fix_sigma_noise else ()
        self._free = Hyperparameters.tuned(self.likelihood, fixed)
        self._adam: dict[str, Any] | None = None
        self._epoch, self._burn_in = 0, BurnIn(over=n_epochs_burnin > 0)
        self._left_start = False
        self.curvature = curvature
        if curvature is not None:
            check_shares(curvature, self._network, self.options, {*self._groups.shapes})
        self._last_pass: GGN | None = None  # what rounds without one take from it
        self._epoch_fit = EpochFit()
        self._constant: float | None = None  # loss of the best constant prediction
        self._then: Tensor | None = None  # entries of the weights at the epoch's first loss
        self._modes: dict[nn.Module, bool] = {}
        self.history: list[Record] = []

    # --- the loss ----------------------------------------------------------------------------

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Negative log joint per example: (1/B) Σ −log p(y|f, σ)/T + (1/2N) Σ δ(θ − μ)².

        Log-likelihoods are sums over positions and outputs; hyperparameters are detached. Where
        other parameters of the model are trained than before, they are grouped anew: precisions go
        on by name, and new groups start at the initial one.

        Args:
            output: what the model returned for a batch of B examples.
            target: its targets.

        Raises:
            InvalidValue: targets of a wrong shape or range, no examples, or shapes that leave open
                where the classes are.
            InvalidType: targets of a wrong dtype, or an output that `Laplace` would not take.
        """
        output, target = output_and_target(output, target)
        if self._live.moved:
            self._follow()
        hyper, known = self._hyper, self._groups.known
        axis = settled_axis(self.likelihood, output, target, self.options.class_axis, known.axis)
        fit = mean_log_likelihood(self.likelihood, output, target, hyper.sigma_noise, axis)
        known = looked_at(known, self.likelihood, output, axis)
        if self._penalty is None:
            several = self._patterns is not None or hyper.prior_precision.numel() > 1
            prior = self._groups.prior or self._groups.first_prior(several)
            self._live = LiveParameters(self._network.model, prior.layouts.params)
            self._penalty = prior.penalty(hyper.prior_precision / (2 * self.n_data))
            self._modes = {}
        if fit.requires_grad:  # not a look at held-out data
            self._modes = self._modes or modes_of(self._network.model)
            self._outputs = output.numel() // len(output)
            if self._burn_in.sums is None and not self._burn_in.over:
                self._then = first_entries(self._network.model)
            measure = unexplained(self.likelihood, fit, self._outputs, hyper.sigma_noise)
            self._burn_in = self._burn_in.with_batch(measure, len(output))
            if self.curvature is not None:
                own = statistic_of_batch(self.likelihood, measure, output, target, axis)
                self._epoch_fit = self._epoch_fit.with_batch(own, len(output))
        settled = known.with_axis(axis, output.ndim)
        if settled is not self._groups.known:
            self._groups = replace(self._groups, known=settled)
        penalty = self._penalty(self._live.found).to(fit.dtype)
        loss = -1 / self._temperature * fit + penalty
        return loss * hyper.sigma_noise.to(fit) ** 2 if self._in_residuals else loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's output on a batch of a loader, in the model's present mode, and its targets.

        Args:
            batch: a pair (x, y), a mapping with targets, graphs, or what `batch_fn` takes.
        """
        x, y = split_batch(batch, self._key_y, self.options.batch_fn)
        # Through wrappers, as the caller trains it: data parallelism averages gradients in them.
        run = Forward(self.model, self.options.forward_fn)
        return run(self._network.batch(x, len(y)).x), y

    def prepare(self, loader: Iterable[Any]) -> None:
        """Learn the groups of parameters from a loader's first batch, before the first round.

        Needed only where the loss cannot know before it which precision pulls which parameter:
        several initial precisions or means (means by pattern excepted), "last_layer", or
        uncovered="freeze"; and where a tuner that was resumed from a state finds other parameters
        trained than before.
        """
        seen, now = KeepsFirst(loader), self._groups.today()
        curvature = now.curvature().read(islice(seen, 1), key_y=self._key_y)
        now = replace(now, examples=self._few(seen))
        self._regroup(now.grouped(curvature.ggn.knowledge))

    def _follow(self) -> None:
        """Take account of parameters that were changed since the last look."""
        now = self._groups.today()
        if now.prior is None and self._groups.prior is not None:
            now = now.regrouped(self._groups)
        self._regroup(now)
        self._live = LiveParameters(self._network.model, ())

    def _regroup(self, groups: Grouping) -> None:
        """Take over groups, with the hyperparameters carried to them."""
        hyper, self._adam = self._carried(groups)
        if groups.prior is not None:
            self._patterns = None
        self._groups = groups
        self._take(hyper)

    def _carried(self, groups: Grouping) -> tuple[Hyperparameters, dict[str, Any] | None]:
        """Today's hyperparameters and Adam's moments as those of other groups."""
        prior, before = groups.prior, self._groups.prior
        hyper = self._hyper.to(self._network.device)
        if prior is not None and before is None:
            given = prior.resolve(self._patterns or hyper.prior_precision)
            hyper = replace(hyper, prior_precision=given) if self._patterns else hyper
        if prior is None or before is None or before.layouts.in_same_order(prior.layouts):
            return hyper, self._adam
        if self._groups.shapes == groups.shapes:
            log.info("the model uses its parameters otherwise: prior precisions go on by name")
        else:
            log.info(
                "other parameters are trained than before (%s): prior precisions go on by name",
                difference(self._groups.shapes, groups.shapes),
            )
        hyper, carry = carried(hyper, before, prior, self._start[0])
        return hyper, carry.moments(self._adam, self._free.index("prior_precision"))

    def _few(self, seen: KeepsFirst) -> Examples:
        return seen.few(self._network, self._key_y, self.options.batch_fn)

    @property
    def _key_y(self) -> str:
        return str(self._fixed["dict_key_y"])

    # --- the rounds --------------------------------------------------------------------------

    def step(self, loader: Iterable[Any] | None = None, epoch: int | None = None) -> Record | None:
        """After an epoch: where a round is due, one curvature pass and hyperparameter steps.

        Args:
            loader: training data; read only when a round is due. None, where there is a
                `curvature`: a round by what the optimiser has averaged, and by the losses that
                `loss` computed in this epoch, without a pass.
            epoch: number of the epoch, from 1; counted by the tuner where it is left out.

        Returns:
            The round's record, or None.

        Raises:
            InvalidValue: a round is due, and there is no loader where one is needed, or the data
                are bad. Nothing is changed then, the epoch count included.
            NotFitted: there is no loader, and the optimiser has captured nothing yet.
        """
        epoch = self._epoch + 1 if epoch is None else epoch
        check_whole("epoch", epoch, 0)
        moved = self._then is None or not torch.equal(
            self._then, first_entries(self._network.model)
        )
        # Losses between which no weight moved are no training.
        burn_in = self._burn_in.ended() if moved else replace(self._burn_in, sums=None)
        if epoch < self.n_epochs_burnin or epoch % self.marglik_frequency:
            self._epoch, self._burn_in, self._epoch_fit = epoch, burn_in, EpochFit()
            return None
        start, shared = time.perf_counter(), loader is None
        found = self._shared() if loader is None else self._passed(loader, epoch, burn_in)
        if burn_in.waits:
            burn_in = burn_in.judged(found.constant)
        self._synchronise()
        curvature_seconds = time.perf_counter() - start
        goal = on_data(self.objective, found.posterior, found.data)
        roles = found.groups.roles
        away = self.n_epochs_burnin == 0 and burn_in.over and not self._left_start
        steps = self.n_hypersteps * (AWAY if away else 1)
        how = None if burn_in.waits else roles, steps
        hyper, moments, bounds = self._improved(found.posterior, found.moments, goal, how)
        with torch.no_grad():
            record = Record.of(
                found.posterior.apart_from_unused.at(hyper),
                goal,
                epoch=epoch,
                seconds=(time.perf_counter() - start, curvature_seconds),
                shared=shared,
            )
        self._groups, self._patterns, self._constant = found.groups, None, found.constant
        self._last_pass, self._epoch_fit = found.last_pass, EpochFit()
        self._take(hyper)
        self._adam, self._epoch, self._burn_in = moments, epoch, burn_in
        self._left_start |= away
        self.history.append(record)
        tell([*roles.claims(), *found.claims], self._said)
        if burn_in.waits and ("waits", "") not in self._said:
            log.info("prior precisions stay until the training loss has settled")
            self._said.add(("waits", ""))
        rounds = len(self.history), rounds_that_moved(self.history)
        told = waiting_claims if burn_in.waits else round_claims
        tell(told(found.posterior.at(hyper), bounds, *rounds), self._said)
        return record

    def _passed(self, loader: Iterable[Any], epoch: int, burn_in: BurnIn) -> Found:
        """What a round goes on from, by a pass over the data."""
        seen = KeepsFirst(loader)
        # Another seed each round, so that Monte-Carlo labels are not the same ones again.
        options = self.options.seeded(self.options.seed + epoch)
        if self._signs and (self._outputs or 0) > FEW_OUTPUTS:
            options = replace(options, fisher=Hybrid(passes=1))
        # What gradients are like before the network has learned says little of them later.
        begins = burn_in.waits and (self._constant is None or burn_in.judged(self._constant).over)
        la, groups, moments = self._fitted(seen, options, decide=begins)
        groups = replace(groups, examples=self._few(seen), settings=la.curvature.settings)
        groups, constant = groups.looked_at(self._modes), constant_unexplained(la.curvature.ggn)
        self._check_count(la.curvature.n_rows)
        last = None
        if self.curvature is not None:
            last = last_pass(la.curvature.ggn, self.curvature, self.options)
        data = Data((loader,), self._key_y, options.seed)
        return Found(la.posterior, groups, moments, constant, data, last)

    def _shared(self) -> Found:
        """What a round goes on from, by the curvature that the optimiser averages."""
        if self.curvature is None:
            raise InvalidValue(
                "a round is due in this epoch",
                where="loader",
                got=None,
                remedy="Pass the training loader",
            )
        groups, last = self._groups.today(), self._last_pass
        if groups is not self._groups or self._constant is None:  # other parameters or device
            last = None
        ggn = shared_ggn(self.curvature, last, groups.known, self._epoch_fit)
        assert groups.prior is not None and last is not None and self._constant is not None
        found = Curvature.of(self.model, self.options)
        found.ggn = ggn
        expansion = Expansion(found.network, ggn, mode_of(found), groups.prior)
        hyper = replace(self._hyper, prior_precision=groups.prior.full(self._hyper.prior_precision))
        data = Data((), self._key_y, self.options.seed)
        posterior, said = Posterior(expansion, hyper), settings_claim(ggn, last)
        return Found(posterior, groups, self._adam, self._constant, data, last, tuple(said))

    def _check_count(self, count: int) -> None:
        """Say, once for each, that a round has another number of examples than was promised."""
        if count != self.n_data and all(record.n_data != count for record in self.history):
            log.warning(
                "the loader holds %d examples where n_data=%d was promised: the loss weighs the "
                "prior by n_data, and `best` compares only evidences over as many examples",
                count,
                self.n_data,
            )

    def _take(self, hyper: Hyperparameters) -> None:
        """Make them today's, with what the loss needs of them."""
        self._hyper = hyper.detached()
        self._temperature = float(hyper.temperature)
        self._penalty = None
        self._damping: dict[str, float] | None = None

    def _fitted(
        self, loader: Iterable[Any], options: CurvatureOptions, decide: bool = False
    ) -> tuple[Laplace, Grouping, dict[str, Any] | None]:
        """A posterior fitted at today's hyperparameters, its groups, and Adam's moments.

        Args:
            loader: training data.
            options: of the curvature.
            decide: expand or reduce anew, whatever earlier rounds took.
        """
        now, start = self._groups.today(), self._start[0]
        now = replace(now, settings={}) if decide else now
        grouped = self._groups.prior is not None
        one = start if isinstance(start, Tensor) and start.numel() == 1 else 1.0
        la = Laplace(
            self.model,
            self.likelihood,
            # Those of groups wait until it shows how these data group the parameters.
            prior_precision=one if grouped else self._patterns or self._hyper.prior_precision,
            sigma_noise=self._hyper.sigma_noise,
            temperature=self._temperature,
            **self._fixed,
            **options.keywords(),
        )
        la.curvature = now.curvature(options)
        la.fit(loader)
        groups = replace(now, known=la.curvature.ggn.knowledge, prior=la.posterior.prior)
        if not grouped:
            return la, groups, self._adam
        hyper, moments = self._carried(groups)
        la.prior_precision = hyper.prior_precision
        return la, groups, moments

    def _synchronise(self) -> None:
        """Wait for the device, so that the clock tells the pass from the steps."""
        if self._network.device.type == "cuda":
            torch.cuda.synchronize(self._network.device)

    def _improved(
        self,
        posterior: Posterior,
        moments: dict[str, Any] | None,
        goal: Objective,
        how: tuple[Roles | None, int],
    ) -> tuple[Hyperparameters, dict[str, Any] | None, Bounds]:
        """The hyperparameters after this round's steps, Adam's state, and how far they could go."""
        posterior, (roles, steps) = posterior.apart_from_unused, how
        start, waits = self._start_of(posterior), roles is None
        held = torch.ones_like(posterior.unused_precisions)
        if roles is not None:
            held = roles.precisions(posterior.prior)
        bounds = Bounds.of(posterior, goal, self._free, start, held).within_spread(posterior)
        search = Search(goal, self._free, steps, bounds=bounds)
        if waits and "sigma_noise" not in self._free:
            return posterior.hyperparameters.detached(), moments, bounds
        if self.method == "mackay":
            return mackay_steps(posterior, search), None, bounds
        hyper, after = adam(posterior, search, lr=self.lr_hyp, state=None if waits else moments)
        return hyper, moments if waits else after, bounds

    def _start_of(self, posterior: Posterior) -> Hyperparameters:
        """The hyperparameters that the tuner started from, as those of a posterior."""
        delta, sigma = self._start
        hyper = posterior.hyperparameters
        try:
            delta = posterior.prior.resolve(delta)
        except InvalidValue:  # of other parameters than are trained now
            delta = hyper.prior_precision
        full = posterior.prior.full(delta)
        return replace(hyper, prior_precision=full, sigma_noise=sigma.to(full.device))

    # --- results -----------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Tensor]:
        """Today's values, detached, float64: δ, and σ of likelihoods with a noise, by name.

        Raises:
            NotFitted: δ was given by patterns, and no batch was seen yet.
        """
        if self._patterns is not None:
            raise NotFitted(
                "which precisions the patterns set shows only when the model is used",
                where="prior_precision",
                remedy="Call tuner.prepare(loader) first",
            )
        return self._hyper.named(self.likelihood)

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter is treated, and whether its precision is tuned, or why it is not.

        Empty before the first round (or `prepare`).
        """
        return self._groups.coverage

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in the order of the layerwise precisions; empty before the first."""
        prior = self._groups.prior
        return tuple(prior.layouts.groups) if prior is not None else ()

    @property
    def best(self) -> Record | None:
        """The record of the largest objective (evidence), or None before the first round.

        Compared are rounds with a pass over the data, over the parameters of the last one and over
        `n_data` examples; where none had as many, over as many as the first of them.
        """
        return best_of(self.history, self.n_data)

    def laplace(self, loader: Iterable[Any]) -> Laplace:
        """Fit a posterior at the model's present weights with today's hyperparameters."""
        if self._burn_in.waits:
            log.info(STILL_WAITS, self._epoch)
        return self._fitted(loader, self.options)[0]

    def __repr__(self) -> str:
        """Likelihood, examples, rounds, and whether precisions move yet, on one line."""
        name = type(self.likelihood).__name__
        parts = [name, f"{self.n_data} examples", f"epoch {self._epoch}"]
        if self.history:
            parts.append(f"evidence {self.history[-1].evidence:.6g} in {len(self.history)} rounds")
        held = self._groups.roles.held if self.groups else {}
        if self.groups:
            parts.append(f"{len(self.groups) - len(held)} of {len(self.groups)} precisions tuned")
        waits = self._burn_in.waits or self._epoch + 1 < self.n_epochs_burnin
        return f"MarglikTuner({', '.join([*parts, 'waiting'] if waits else parts)})"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, from which training goes on as if it had not stopped."""
        known, prior = self._groups.known, self._groups.prior
        content = {
            "format": FORMAT,
            "options": self._plain_options(),
            "sharing": None if prior is None else prior.digest,
            "hyperparameters": asdict(self._hyper),
            "tuned": list(self._free),
            "tune": self._groups.tune,
            "objective": name_of(self.objective),
            "adam": copy.deepcopy(self._adam),
            "epoch": self._epoch,
            "history": [asdict(record) for record in self.history],
            "groups": None if prior is None else groups_to_plain(known.groups),
            "patterns": self._patterns,
            "class_axis": known.axis,
            "start": list(self._start),
            "burn_in": asdict(self._burn_in),
            "outputs": self._outputs,
            "left_start": self._left_start,
            "then": self._then,
            "modes": list(self._modes.values()),
            "began": dict(self._groups.began),
            "training": training_to_plain(self._groups.training),
            "settings": dict(self._groups.settings),
            "constant": self._constant,
            "shared": None,
        }
        if self.curvature is not None:
            last = last_pass_to_plain(self._last_pass)
            content["shared"] = {"last_pass": last, "epoch": asdict(self._epoch_fit)}
        return sealed(content)

    def damping(self) -> dict[str, float]:
        """λ = δ σ² T / N of each parameter, by name: what its prior adds to the curvature.

        In units of the curvature of the mean negative log-likelihood at σ = T = 1, as
        `kfac_laplace.optim.KFAC` has it; δ/N where there is no noise. The mean δ where a group has
        several. Empty while δ is given by patterns and no batch was seen.
        """
        if self._damping is None:
            hyper = self._hyper
            unit = self.likelihood.precision(hyper.sigma_noise) / hyper.temperature * self.n_data
            prior, strengths = self._groups.prior, hyper.prior_precision / unit
            if self._patterns is not None:
                self._damping = {}
            elif prior is None:
                same = hyper.prior_precision.numel() == 1
                self._damping = dict.fromkeys(self._groups.shapes, float(strengths)) if same else {}
            else:
                means = {n: one.mean() for n, one in prior.by_group(strengths).items()}
                numbers = torch.stack([*means.values()]).tolist()
                layouts = prior.layouts.groups.values()
                pairs = zip(layouts, numbers, strict=True)
                self._damping = {name: x for layout, x in pairs for name in layout.params}
        return dict(self._damping)

    def _plain_options(self) -> dict[str, Any]:
        structure = sharing_to_plain(self._fixed["prior_structure"])
        return {**self.options.to_plain(), **self._fixed, "prior_structure": structure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made with the same options on the same architecture.

        Hyperparameters, T included, Adam's moments, epoch and history are the state's. Options on
        which these depend have to be the same, fix_sigma_noise and objective among them. The
        tuner's own stay n_data, n_epochs_burnin, marglik_frequency, n_hypersteps, lr_hyp, method,
        seed, factor_dtype, memory_budget, forward_fn, batch_fn and dict_key_y.

        Raises:
            InvalidValue: not a tuner's state, one of another version, model or option, a damaged or
                changed one; nothing is changed then.
        """
        device, now = self._network.device, self._groups.today()
        rows = now.known
        now = replace(now, prior=None, settings={})
        with refusing_damage():
            found = opened(state, KEYS, "a tuner", LATER)
            remedy = "Make the tuner with the stored options"
            check_options(found["options"], self._plain_options(), remedy)
            check_goal(found, self._free, self._groups.tune, self.objective)
            read = resumed(found, self.likelihood, device)
            if read.groups is not None:
                now = now.grouped(knowledge_of_groups(read.groups, self._network, self.options))
                assert now.prior is not None
                now.prior.full(read.hyper.prior_precision)
                check_same_sharing(now.prior, found["sharing"].text())
                if found["settings"].value:  # decided
                    now = replace(now, settings=settings_of(found["settings"], read.groups))
            last, fit = self._shared_of(found["shared"], now if now.prior else None)
            check_seal(state, "state")
        known = now.known
        if read.class_axis is not None:
            known = replace(known, class_axis=read.class_axis, axis_known=True)
        self._groups = replace(
            now,
            known=known.with_rows_of(rows),
            began=read.began,
            training=read.training,
        )
        self._take(read.hyper)
        self._epoch, self.history, self._patterns = read.epoch, read.history, read.patterns
        self._adam, self._start = read.adam, read.start
        self._outputs, self._left_start, self._then = read.outputs, read.left_start, read.then
        self._constant = read.constant
        self._last_pass, self._epoch_fit = last, fit
        modules = [*self._network.model.modules()]
        self._modes = dict(zip(modules, read.modes, strict=len(read.modes) > 0))
        self._burn_in = read.burn_in if self.n_epochs_burnin == 0 else BurnIn(over=True)

    def _shared_of(self, stored: Stored, now: Grouping | None) -> tuple[GGN | None, EpochFit]:
        """What a state has for rounds without a pass; nothing where there will be none."""
        if stored.value is None:
            return None, EpochFit()
        found, device = stored.fields(("last_pass", "epoch")), self._network.device
        fit = epoch_fit_from_plain(found["epoch"], device)
        known, settings = (None, {}) if now is None else (now.known, now.settings)
        last = last_pass_from_plain(found["last_pass"], known, self.options, settings, device)
        return (last, fit) if self.curvature is not None else (None, EpochFit())
