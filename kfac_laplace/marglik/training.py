"""`marglik_training`: the whole training loop in one call, as laplace-torch's users know it."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from typing_extensions import Unpack

from kfac_laplace.curvature.checkpoint import Checkpoint
from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.model.kept import Kept
from kfac_laplace.curvature.options import CurvatureKeywords, CurvatureOptions
from kfac_laplace.curvature.ranks import data_parallel
from kfac_laplace.curvature.shards import own_part
from kfac_laplace.curvature.spelling import spelled
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import Likelihood, LikelihoodName
from kfac_laplace.marglik.burn_in import BEGINNING
from kfac_laplace.marglik.interrupted import Part, Training
from kfac_laplace.marglik.roles import Tune
from kfac_laplace.marglik.tuner import MarglikTuner, Method
from kfac_laplace.migration import refused
from kfac_laplace.optim import KFAC
from kfac_laplace.options import check_choice, check_iterable, check_text, check_whole
from kfac_laplace.posterior.objectives import AnyObjective
from kfac_laplace.posterior.prior import Given
from kfac_laplace.posterior.sharing import PriorStructure


@refused.answering(refused.TRAINING)
@spelled
def marglik_training(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: LikelihoodName | Likelihood = "classification",
    hessian_structure: Structure = "kron",
    *,
    optimizer_cls: type[Optimizer] = Adam,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    scheduler_cls: type[LRScheduler] | None = None,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    n_epochs: int = 300,
    lr_hyp: float = 0.1,
    prior_structure: PriorStructure = "layerwise",
    n_epochs_burnin: int = 0,
    n_hypersteps: int = 10,
    marglik_frequency: int = 1,
    prior_prec_init: Given = BEGINNING,
    prior_mean: Given = 0.0,
    sigma_noise_init: float = 1.0,
    temperature: float = 1.0,
    fix_sigma_noise: bool = False,
    method: Method = "marglik",
    objective: str | AnyObjective = "auto",
    tune: Tune = "auto",
    loss_units: str = "nats",
    keep: str = "last",
    progress_bar: bool = False,
    dict_key_y: str = "labels",
    checkpoint: Checkpoint | str | Path | None = None,
    **curvature: Unpack[CurvatureKeywords],
) -> tuple[Laplace, nn.Module, list[float], list[float]]:
    """Train a network and its hyperparameters together [ML21, Algorithm 1].

    Args:
        model: the network; trained in place, its mode is put back at the end.
        train_loader: a loader that can be read every epoch.
        likelihood: "classification" or another name of docs/likelihoods.md, or a `Likelihood`.
        hessian_structure: "kron", "ekfac", "diag", "full", "lowrank", `LowRank(rank)`,
            or `Kron(rank)`.
        optimizer_cls: optimiser of the weights; `kfac_laplace.optim.KFAC` is given the model and
            the likelihood as well. Its own weight decay is 0, whatever its default: the prior is.
        optimizer_kwargs: its options.
        scheduler_cls: learning-rate schedule, stepped after every batch.
        scheduler_kwargs: its options.
        n_epochs: training epochs.
        lr_hyp: Adam's learning rate on the log-hyperparameters.
        prior_structure: how δ is shared; as for `Laplace`, with all its forms.
        n_epochs_burnin: as for `MarglikTuner`.
        n_hypersteps: steps in each round; as for `MarglikTuner`.
        marglik_frequency: a round in every epoch that is a multiple of it.
        prior_prec_init: initial prior precision; as `prior_precision` of `MarglikTuner`.
        prior_mean: μ; as for `Laplace`.
        sigma_noise_init: initial observation noise.
        temperature: T, the same in the loss and in the posterior.
        fix_sigma_noise: leave σ alone.
        method: "marglik" for Adam on the objective, "mackay" for the evidence's fixed point.
        objective: what rounds maximise, by name or as a function; as for `MarglikTuner`.
        tune: which precisions are tuned; as for `MarglikTuner`.
        loss_units: as for `MarglikTuner`.
        keep: "last" for the weights at the end, "best" for those of the round of highest objective.
            Training raises the joint of data and weights, not the evidence, which may be highest
            while a network still underfits: "best" is no early stopping.
        progress_bar: show one, an epoch a step.
        dict_key_y: name of the targets where batches are mappings.
        checkpoint: a path, or a `Checkpoint`, where training keeps all that it goes on from; called
            again after the process died, with the same arguments, it ends at the same bits.
            `n_epochs` may be more. The file is removed at the end.
        curvature: further options of `Curvature` by their names: kfac_approx, fisher,
            subset_of_weights, joint_bias, uncovered, seed, factor_dtype, memory_budget, offload,
            class_axis, forward_fn, batch_fn, process_group (the model is wrapped in
            DistributedDataParallel then, and the loader yields this process's part).

    Returns:
        The posterior at the weights and hyperparameters that `keep` says, the model with those
        weights, the negative log evidence of each round, and the mean loss of each epoch.

    Raises:
        InvalidValue: an empty loader, weight decay in `optimizer_kwargs`, a negative number of
            epochs, bad data, or a checkpoint that is damaged or of another training.
        UnsupportedUse: an optimiser whose steps evaluate the loss again.
    """
    options = dict(optimizer_kwargs or {})
    if options.get("weight_decay"):
        raise InvalidValue(
            "the prior is the weight decay",
            where="optimizer_kwargs",
            got=f"weight_decay={options['weight_decay']}",
            remedy="Leave it out; set prior_prec_init instead",
        )
    check_whole("n_epochs", n_epochs, 0)
    check_text("dict_key_y", dict_key_y)
    check_choice("keep", keep, ("last", "best"))
    check_iterable("train_loader", train_loader)
    # What is refused is refused before data are read.
    blank = Laplace(model, likelihood, hessian_structure=hessian_structure, **curvature)
    ranks = blank.options.ranks
    if ranks is not None:
        if data_parallel(model) is None:
            raise UnsupportedUse(
                "processes that train on their own have other weights after a step",
                where="model",
                got=type(model).__name__,
                remedy="Pass torch.nn.parallel.DistributedDataParallel(model)",
            )
        if checkpoint is not None:
            raise UnsupportedUse(
                "processes that train together would go on from different steps",
                where="checkpoint",
                got="process_group",
                remedy="Save the states of model, optimiser and tuner in a loop of your own",
            )
    n_data = _count_all(train_loader, dict_key_y, blank.options)
    if not n_data:
        raise InvalidValue("the loader yielded no batch", where="train_loader", got="0 examples")
    tuner = MarglikTuner(
        model,
        likelihood,
        n_data,
        prior_structure=prior_structure,
        prior_precision=prior_prec_init,
        prior_mean=prior_mean,
        sigma_noise=sigma_noise_init,
        temperature=temperature,
        fix_sigma_noise=fix_sigma_noise,
        hessian_structure=hessian_structure,
        dict_key_y=dict_key_y,
        **curvature,
        n_epochs_burnin=n_epochs_burnin,
        marglik_frequency=marglik_frequency,
        n_hypersteps=n_hypersteps,
        lr_hyp=lr_hyp,
        method=method,
        objective=objective,
        tune=tune,
        loss_units=loss_units,
    )
    tuner.prepare(train_loader)
    optimiser = _optimiser(optimizer_cls, tuner, options)
    scheduler = scheduler_cls(optimiser, **(scheduler_kwargs or {})) if scheduler_cls else None
    modes, held = {module: module.training for module in model.modules()}, Kept(model)
    kept = Checkpoint.of(checkpoint)
    parts: dict[str, Part] = {"tuner": tuner, "optimizer": optimiser}
    if scheduler is not None:
        parts["scheduler"] = scheduler
    made = {"n_data": n_data, "keep": keep, "optimizer": type(optimiser).__name__}
    made["scheduler"] = type(scheduler).__name__
    try:
        model.train()
        with Training(kept, model, parts, made, train_loader) as training:
            reached = training.reached
            for epoch in tqdm(
                training.epochs(n_epochs), disable=not progress_bar, desc="marglik training"
            ):
                _train_epoch(tuner, training, optimiser, scheduler)
                record = tuner.step(training.data(), epoch)
                if keep == "best" and record is not None and record is tuner.best:
                    training.best = {
                        "model": copy.deepcopy(dict(model.state_dict())),
                        "tuner": copy.deepcopy(tuner.state_dict()),
                    }
                reached.end(ranks)
    finally:
        for module, mode in modes.items():
            module.training = mode
        held.release()
        if isinstance(optimiser, KFAC):
            optimiser.close()
    losses, best = reached.losses, training.best
    margliks = [-record.evidence for record in tuner.history]
    if best is not None:
        model.load_state_dict(best["model"])
        tuner.load_state_dict(best["tuner"])
    la = tuner.laplace(train_loader)
    if kept is not None:
        kept.ended()
    return la, model, margliks, losses


def _optimiser(of: type[Optimizer], tuner: MarglikTuner, options: Mapping[str, Any]) -> Optimizer:
    """An optimiser of what is trained, without the weight decay that some have by default."""
    trained = [p for p in tuner.model.parameters() if p.requires_grad]
    if isinstance(of, type) and issubclass(of, KFAC):  # it may be a function that makes one
        axis = {"class_axis": tuner.options.class_axis}
        likelihood = tuner.options.likelihood
        made: Optimizer = of(tuner.model, likelihood, trained, **{**axis, **options})
    else:
        made = of(trained, **options)
    closure = inspect.signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UnsupportedUse(
            "steps of this optimiser evaluate the loss again, and this loop makes one pass a step",
            where="optimizer_cls",
            got=type(made).__name__,
            remedy="Choose another, or write the loop with MarglikTuner.loss",
        )
    for group in made.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    return made


def _train_epoch(
    tuner: MarglikTuner,
    training: Training,
    optimiser: Optimizer,
    scheduler: LRScheduler | None,
) -> None:
    """One pass over the data, or what is left of it."""
    for batch in training.new_batches():
        output, y = tuner.forward(batch)
        loss = tuner.loss(output, y)
        if not bool(torch.isfinite(loss)):
            raise InvalidValue(
                "non-finite training loss",
                where="marglik_training",
                got=float(loss.detach()),
                remedy="Lower the learning rate; the weights are those of the last finite step",
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if scheduler is not None:
            scheduler.step()
        training.reached.add(float(loss.detach()), len(output))


def _count_all(loader: Iterable[Any], key_y: str, options: CurvatureOptions) -> int:
    """Number of examples, of all processes where each reads a part."""
    ranks = options.ranks
    part = loader if ranks is None else own_part(loader, ranks)

    def own() -> int:
        return sum(len(split_batch(batch, key_y, options.batch_fn)[1]) for batch in part)

    return own() if ranks is None else sum(ranks.gathered(own))
