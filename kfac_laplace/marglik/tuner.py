"""`MarglikTuner`: optimises hyperparameters by the Laplace evidence during training [ML21, Alg. 1].

The caller keeps the training loop. The tuner supplies the loss at today's hyperparameters and,
every few epochs, one curvature pass and some steps on log δ and log σ.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.model.forward import Forward
from kfac_laplace.curvature.options import CurvatureKeywords
from kfac_laplace.curvature.spelling import spelled
from kfac_laplace.devices import finish
from kfac_laplace.errors import NotFitted, UnsupportedUse
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import Likelihood, LikelihoodName, settled_axis
from kfac_laplace.marglik.burn_in import BEGINNING, AtMost, BurnIn
from kfac_laplace.marglik.decay import DecayWatch
from kfac_laplace.marglik.found import Found, by_a_pass, by_averages, fitted
from kfac_laplace.marglik.grouping import Grouping
from kfac_laplace.marglik.live import LiveParameters
from kfac_laplace.marglik.loss import (
    looked_at,
    mean_log_likelihood,
    output_and_target,
    statistic_of_batch,
    unexplained,
)
from kfac_laplace.marglik.progress import Progress
from kfac_laplace.marglik.record import (
    Record,
    best_of,
    history_as_json,
    rounds_that_moved,
    warn_of_count,
)
from kfac_laplace.marglik.roles import Tune
from kfac_laplace.marglik.sample import first_kept
from kfac_laplace.marglik.shared import AveragesCurvature, EpochFit, check_shares
from kfac_laplace.marglik.snapshot import Snapshot
from kfac_laplace.marglik.standing import Setup, Standing
from kfac_laplace.marglik.steps import Steps
from kfac_laplace.options import check_choice, check_positive, check_whole
from kfac_laplace.posterior.claims import round_claims, tell, waiting_claims
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.mackay import check_objective
from kfac_laplace.posterior.objectives import (
    AnyObjective,
    DataObjective,
    on_data,
    resolve_objective,
)
from kfac_laplace.posterior.prior import Given, checked_mean, starting_precision
from kfac_laplace.posterior.sharing import PriorStructure
from kfac_laplace.states.files import write_text

log = logging.getLogger("kfac_laplace")

Method = Literal["marglik", "mackay"]
METHODS: tuple[Method, ...] = get_args(Method)
UNITS = ("nats", "residuals")
#: How many rounds' steps the round takes in which hyperparameters leave their start.
AWAY = 5


class MarglikTuner:
    """Tunes prior precisions, and the noise of regression, by the evidence while you train.

    Args:
        model: the network in training; never changed, its mode and optimiser are the caller's. Give
            the optimiser no weight decay: the loss has the prior.
        likelihood: "classification" or another name of docs/likelihoods.md, or a `Likelihood`.
        n_data: number of training examples (of nodes, where each node has an output), by which the
            loss weighs the prior; with a process group of all its processes together.
        prior_structure: how δ is shared; as for `Laplace`, with all its forms.
        prior_precision: initial δ; as for `Laplace`. Left out: 10⁻⁴ for each training example, a
            common weight decay, and at most 1.
        prior_mean: μ; as for `Laplace`.
        sigma_noise: initial σ, of likelihoods with a noise.
        temperature: T, the same in the loss and in the posterior.
        fix_sigma_noise: leave σ alone.
        hessian_structure: as for `Laplace`.
        dict_key_y: as for `Laplace`.
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
        options: of the curvature, all as for `Laplace`: fisher, kfac_approx, subset_of_weights,
            joint_bias, uncovered, seed, factor_dtype, memory_budget, offload, process_group,
            class_axis, forward_fn, batch_fn. `fisher` left out is "exact", but that rounds take
            `Hybrid(passes=1)`, one backward pass with random signs, where an example has more than
            five outputs.

    Raises:
        InvalidValue: an option out of range.
    """

    _at: Standing
    _penalty: Callable[[Mapping[str, Tensor]], Tensor] | None  # of the loss
    _damping: dict[str, float] | None
    _temperature: float

    @spelled
    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodName | Likelihood,
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
        method: Method = "marglik",
        objective: str | AnyObjective = "auto",
        tune: Tune = "auto",
        loss_units: str = "nats",
        curvature: AveragesCurvature | None = None,
        **options: Unpack[CurvatureKeywords],
    ):
        check_whole("n_data", n_data, 1)
        check_whole("n_epochs_burnin", n_epochs_burnin, 0)
        check_whole("marglik_frequency", marglik_frequency, 1)
        check_whole("n_hypersteps", n_hypersteps, 1)
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
        if self.options.process_group is not None and isinstance(self.objective, DataObjective):
            raise UnsupportedUse(
                "this objective looks at all training data once more, and ranks have parts",
                where="objective",
                got=repr(objective),
                remedy="Use objective='kron' with process_group",
            )
        self._signs = "fisher" not in options
        self.likelihood = blank.likelihood
        self._in_residuals = loss_units == "residuals" and self.likelihood.has_gaussian_noise
        groups = Grouping.of(model, self.options, self._fixed["prior_structure"], mean, tune)
        self._network = blank.curvature.network
        self._live = LiveParameters(self._network.model, ())
        if isinstance(prior_precision, AtMost):
            prior_precision = prior_precision.start(n_data)
        delta, patterns = starting_precision(prior_precision, self._network.device)
        hyper = Hyperparameters(delta, blank.sigma_noise, blank.temperature).detached()
        start = patterns or hyper.prior_precision, hyper.sigma_noise
        self._stand(Standing(hyper, groups, patterns, start))
        fixed = ("sigma_noise",) if fix_sigma_noise else ()
        self._free = Hyperparameters.tuned(self.likelihood, fixed)
        self.curvature = curvature
        if curvature is not None:
            check_shares(curvature, self._network, self.options, {*groups.shapes})
        self._progress = Progress(BurnIn(over=n_epochs_burnin > 0))
        self._constant: float | None = None  # loss of the best constant prediction
        self._last_pass: GGN | None = None  # what rounds without one take from it
        self._said: set[tuple[str, str]] = set()
        self._decay = DecayWatch()
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
        data = self.data_loss(output, target)
        loss = data + self._prior_loss().to(data.dtype)
        variance = self._at.hyper.sigma_noise.to(data) ** 2
        return loss * variance if self._in_residuals else loss

    def data_loss(self, output: Any, target: Tensor) -> Tensor:
        """The data's part of `loss`, (1/B) Σ −log p(y|f, σ)/T, for loops that add the prior's.

        Arguments and errors are those of `loss`. Computed with gradients it counts as training:
        from these losses the tuner sees when the network has settled.
        """
        output, target = output_and_target(output, target)
        self._follow()
        hyper, groups = self._at.hyper, self._at.groups
        known, model = groups.known, self._network.model
        axis = settled_axis(self.likelihood, output, target, self.options.class_axis, known.axis)
        fit = mean_log_likelihood(self.likelihood, output, target, hyper.sigma_noise, axis)
        known = looked_at(known, self.likelihood, output, axis)
        self._todays_penalty()
        if fit.requires_grad:  # not a look at held-out data
            outputs, own = output.numel() // len(output), None
            measure = unexplained(self.likelihood, fit, outputs, hyper.sigma_noise)
            if self.curvature is not None:
                own = statistic_of_batch(self.likelihood, measure, output, target, axis)
            self._progress = self._progress.with_batch(model, output, measure, own)
            self._decay.watch(model, groups.shapes)
        settled = known.with_axis(axis, output.ndim)
        if settled is not groups.known:
            self._at = replace(self._at, groups=replace(groups, known=settled))
        return -1 / self._temperature * fit

    def prior_gradient(self) -> dict[Tensor, Tensor]:
        """The gradient of the prior's part of `loss`, δ (θ − μ)/N, of each trained parameter.

        In nats, whatever `loss_units` is: it belongs to `data_loss`.
        """
        with torch.enable_grad():
            loss = self._prior_loss()
        params = list(self._live.found.values())
        return dict(zip(params, torch.autograd.grad(loss, params), strict=True))

    def _prior_loss(self) -> Tensor:
        """(1/2N) Σ δ (θ − μ)² at the parameters as they are."""
        self._follow()
        return self._todays_penalty()(self._live.found)

    def _follow(self) -> None:
        """Group the parameters anew where others are trained than before."""
        if self._live.moved:
            self._stand(self._at.today(self._setup))
            self._live = LiveParameters(self._network.model, ())

    def _todays_penalty(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The prior's part of the loss as a function of the parameters, made where it is none."""
        if self._penalty is None:
            hyper, groups = self._at.hyper, self._at.groups
            several = self._at.patterns is not None or hyper.prior_precision.numel() > 1
            prior = groups.prior or groups.first_prior(several)
            self._live = LiveParameters(self._network.model, prior.layouts.params)
            self._penalty = prior.penalty(hyper.prior_precision / (2 * self.n_data))
            self._progress = replace(self._progress, modes={})
        return self._penalty

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's output on a batch of a loader, in the model's present mode, and its targets.

        Args:
            batch: a pair (x, y), a mapping with targets, graphs, or what `batch_fn` takes.
        """
        x, y = split_batch(batch, self._setup.key_y, self.options.batch_fn)
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
        seen, key_y = first_kept(loader, self.options), self._setup.key_y
        now = self._at.groups.today()
        curvature = now.curvature().read([*islice(seen, 1)], key_y=key_y)
        examples = seen.few(self._network, key_y, self.options)
        now = replace(now, examples=examples).grouped(curvature.ggn.knowledge)
        self._stand(self._at.over(now, self._setup))

    def _stand(self, standing: Standing) -> None:
        """Go on from there, with what the loss needs of it."""
        self._at = replace(standing, hyper=standing.hyper.detached())
        self._temperature = float(self._at.hyper.temperature)
        self._penalty = None
        self._damping = None

    @property
    def _setup(self) -> Setup:
        """What stays from call to call."""
        return Setup(
            self._network,
            self.options,
            self._fixed,
            self._free,
            self.objective,
            self.curvature,
            self._signs,
        )

    # --- the rounds --------------------------------------------------------------------------

    def step(self, loader: Iterable[Any] | None = None, epoch: int | None = None) -> Record | None:
        """After an epoch: where a round is due, one curvature pass and hyperparameter steps.

        With a process group all of its processes call this after every epoch, each with the loader
        of its part, and all end with the same hyperparameters. The weights, and statistics of batch
        norms, have to be the same on all.

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
        epoch = self._progress.epoch + 1 if epoch is None else epoch
        check_whole("epoch", epoch, 0)
        self._decay.end()
        seen = self._progress.of_all(self.options.ranks, self._network.model)
        progress = seen.ended(self._network.model, epoch)
        if epoch < self.n_epochs_burnin or epoch % self.marglik_frequency:
            self._progress = progress
            return None
        began = time.perf_counter()
        found = self._found(loader, progress, seen.fit)
        burn_in = progress.burn_in
        if burn_in.waits:
            burn_in = burn_in.judged(found.constant)
        finish(self._network.device)  # the clock tells the pass from the steps
        curvature_seconds = time.perf_counter() - began
        goal = on_data(self.objective, found.posterior, found.data)
        roles = found.standing.groups.roles
        away = self.n_epochs_burnin == 0 and burn_in.over and not progress.left_start
        count, moving = self.n_hypersteps * (AWAY if away else 1), None if burn_in.waits else roles
        steps = Steps(self.method, self.lr_hyp, count, self._free, moving)
        hyper, moments, bounds = steps.improved(found.standing, found.posterior, goal)
        with torch.no_grad():
            record = Record.of(
                found.posterior.apart_from_unused.at(hyper),
                goal,
                epoch=epoch,
                seconds=(time.perf_counter() - began, curvature_seconds),
                shared=loader is None,
            )
        self._stand(replace(found.standing, hyper=hyper, moments=moments, patterns=None))
        self._constant, self._last_pass = found.constant, found.last_pass
        left = progress.left_start or away
        self._progress = replace(progress, burn_in=burn_in, left_start=left)
        self.history.append(record)
        tell([*roles.claims(), *found.claims], self._said)
        if burn_in.waits and ("waits", "") not in self._said:
            log.info("prior precisions stay until the training loss has settled")
            self._said.add(("waits", ""))
        rounds = len(self.history), rounds_that_moved(self.history)
        told = waiting_claims if burn_in.waits else round_claims
        tell(told(found.posterior.at(hyper), bounds, *rounds), self._said)
        return record

    def _found(self, loader: Iterable[Any] | None, progress: Progress, fit: EpochFit) -> Found:
        """What a round goes on from."""
        setup, at, constant = self._setup, self._at, self._constant
        if loader is None:
            return by_averages(setup, at, fit, self._last_pass, constant)
        found = by_a_pass(setup, at, progress, loader, constant)
        warn_of_count(self.history, int(found.posterior.ggn.n_rows), self.n_data)
        return found

    # --- results -----------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Tensor]:
        """Today's values, detached, float64: δ, and σ of likelihoods with a noise, by name.

        Raises:
            NotFitted: δ was given by patterns, and no batch was seen yet.
        """
        if self._at.patterns is not None:
            raise NotFitted(
                "which precisions the patterns set shows only when the model is used",
                where="prior_precision",
                remedy="Call tuner.prepare(loader) first",
            )
        return self._at.hyper.named(self.likelihood)

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter is treated, and whether its precision is tuned, or why it is not.

        Empty before the first round (or `prepare`).
        """
        return self._at.groups.coverage

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in the order of the layerwise precisions; empty before the first."""
        prior = self._at.groups.prior
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
        if self._progress.burn_in.waits:
            log.info(
                "a posterior by the precisions of the start: in %d epochs the training loss has "
                "not settled. optimize_prior() chooses precisions for the weights as they are; "
                "n_epochs_burnin=k has the tuner move them from epoch k on",
                self._progress.epoch,
            )
        return fitted(self._setup, self._at, loader, self.options)[0]

    def __repr__(self) -> str:
        """Likelihood, examples, rounds, and whether precisions move yet, on one line."""
        name = type(self.likelihood).__name__
        parts = [name, f"{self.n_data} examples", f"epoch {self._progress.epoch}"]
        if self.history:
            parts.append(f"evidence {self.history[-1].evidence:.6g} in {len(self.history)} rounds")
        held = self._at.groups.roles.held if self.groups else {}
        if self.groups:
            parts.append(f"{len(self.groups) - len(held)} of {len(self.groups)} precisions tuned")
        waits = self._progress.burn_in.waits or self._progress.epoch + 1 < self.n_epochs_burnin
        return f"MarglikTuner({', '.join([*parts, 'waiting'] if waits else parts)})"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, from which training goes on as if it had not stopped."""
        now = Snapshot(self._at, self._progress, self.history, self._constant, self._last_pass)
        return now.to_plain(self._setup)

    def save_history(self, path: str | Path) -> None:
        """Write the records of all rounds as a JSON list, in place of what the path held before.

        Args:
            path: of the file; its entries are those of `Record.to_dict`.
        """
        write_text(history_as_json(self.history), path)

    def damping(self) -> dict[str, float]:
        """λ = δ σ² T / N of each parameter, by name: what its prior adds to the curvature.

        In units of the curvature of the mean negative log-likelihood at σ = T = 1, as
        `kfac_laplace.optim.KFAC` has it; δ/N where there is no noise. The mean δ where a group has
        several. Empty while δ is given by patterns and no batch was seen.
        """
        if self._damping is None:
            self._damping = self._at.damping(self.likelihood, self.n_data)
        return dict(self._damping)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made with the same options on the same architecture.

        Hyperparameters, T included, Adam's moments, epoch and history are the state's. Options on
        which these depend have to be the same, fix_sigma_noise and objective among them. The
        tuner's own stay n_data, n_epochs_burnin, marglik_frequency, n_hypersteps, lr_hyp, method,
        seed, factor_dtype, memory_budget, offload, process_group, forward_fn, batch_fn and
        dict_key_y.

        Raises:
            InvalidValue: not a tuner's state, one of another version, model or option, a damaged or
                changed one; nothing is changed then.
        """
        read = Snapshot.from_plain(state, self._setup, self._at.groups.today())
        self._stand(read.standing)
        self._progress, self.history = read.progress, read.history
        self._constant, self._last_pass = read.constant, read.last_pass
        if self.n_epochs_burnin:
            self._progress = replace(read.progress, burn_in=BurnIn(over=True))
