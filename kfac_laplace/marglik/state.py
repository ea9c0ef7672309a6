"""What a tuner's state holds, checked as it is read: records, Adam's moments, groups."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.plain_groups import groups_from_plain
from kfac_laplace.curvature.state import axis_of
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.marglik.burn_in import BurnIn
from kfac_laplace.marglik.record import Record
from kfac_laplace.marglik.roles import Tune
from kfac_laplace.marglik.training_mode import TrainingMode
from kfac_laplace.options import check_choice
from kfac_laplace.posterior.hyperparameters import Hyperparameters, positive
from kfac_laplace.posterior.objectives import AnyObjective
from kfac_laplace.posterior.objectives.registry import NAMED
from kfac_laplace.posterior.prior import given_precision, starting_precision
from kfac_laplace.posterior.state import hyperparameters_from_state
from kfac_laplace.states.stored import Stored

#: What the state of a tuner holds beside its format and its checksum.
KEYS = (
    "options",
    "sharing",
    "hyperparameters",
    "tuned",
    "objective",
    "adam",
    "epoch",
    "history",
    "groups",
    "patterns",
    "class_axis",
    "start",
)

#: What was added later, and what a state without has: it tuned all from the first round on.
LATER: dict[str, Any] = {
    "tune": "all",
    "burn_in": {"epochs": [], "sums": None, "over": True},
    "outputs": None,
    "left_start": True,
    "then": None,
    "modes": [],
    "began": {},
    "training": None,
    "settings": {},
    "constant": None,
    "shared": None,
}


@dataclass(frozen=True)
class Resumed:
    """The state of a tuner, read.

    Args:
        hyper: today's hyperparameters.
        adam: Adam's state, or None.
        epoch: number of the last epoch.
        history: records of the rounds so far.
        groups: groups of parameters, or None before a batch was seen.
        patterns: δ by patterns, before that.
        class_axis: that of the outputs, or None while no batch has settled it.
        start: δ, or patterns of it, and σ with which the tuner began.
        burn_in: how far the training loss has settled.
        outputs: of an example, None where no loss was computed.
        left_start: whether precisions have left their start.
        modes: of the modules, in the model's order, in training; none where none was seen.
        then: the first entry of each parameter at the first loss of the epoch.
        began: root mean squares of the parameters when the tuner was made.
        training: what is special about training mode, None where it was not looked at.
        constant: loss of the best constant prediction in the last round, None before the first.
    """

    hyper: Hyperparameters
    adam: dict[str, Any] | None
    epoch: int
    history: list[Record]
    groups: tuple[Group, ...] | None
    patterns: dict[str, float] | None
    class_axis: int | None
    start: tuple[Tensor | dict[str, float], Tensor]
    burn_in: BurnIn
    outputs: int | None
    left_start: bool
    then: Tensor | None
    modes: tuple[bool, ...]
    began: dict[str, float]
    training: TrainingMode | None
    constant: float | None


def resumed(found: Mapping[str, Stored], likelihood: Likelihood, device: torch.device) -> Resumed:
    """The entries of a tuner's state.

    Raises:
        InvalidValue: entries of another kind, or that contradict one another.
    """
    hyper = hyperparameters_from_state(found["hyperparameters"], likelihood, device)
    groups = None if found["groups"].value is None else groups_from_plain(found["groups"])
    if groups == ():
        raise found["groups"].fault("no group")
    patterns = None
    if found["patterns"].value is not None:
        patterns = {name: one.number() for name, one in found["patterns"].items().items()}
        patterns = starting_precision(patterns, device)[1]
        if groups is not None:
            raise found["patterns"].fault("patterns beside the groups that they were for")
    history = [_record(entry, likelihood) for entry in found["history"].entries()]
    tuned = [entry.text(Hyperparameters.rows()) for entry in found["tuned"].entries()]
    return Resumed(
        hyper,
        _adam(found["adam"], hyper, tuned),
        found["epoch"].whole(),
        history,
        groups,
        patterns,
        axis_of(found["class_axis"]),
        _start(found["start"], device),
        _burn_in(found["burn_in"], device),
        None if found["outputs"].value is None else found["outputs"].whole(1),
        found["left_start"].flag(),
        None if found["then"].value is None else found["then"].tensor().to(device),
        tuple(one.flag() for one in found["modes"].entries()),
        {name: one.number() for name, one in found["began"].items().items()},
        _training(found["training"]),
        None if found["constant"].value is None else found["constant"].number(),
    )


def training_to_plain(training: TrainingMode | None) -> dict[str, Any] | None:
    """What is special about training mode, as plain data."""
    if training is None:
        return None
    return {
        "batch_statistics": training.batch_statistics,
        "scale_free": sorted(training.scale_free),
        "modes": list(training.modes),
    }


def _training(stored: Stored) -> TrainingMode | None:
    """The inverse of `training_to_plain`."""
    if stored.value is None:
        return None
    found = stored.fields(("batch_statistics", "scale_free", "modes"))
    modes = tuple(one.flag() for one in found["modes"].entries())
    free = frozenset(found["scale_free"].texts())
    return TrainingMode(found["batch_statistics"].flag(), free, modes)


def _burn_in(stored: Stored, device: torch.device) -> BurnIn:
    """How far the training loss has settled."""
    found = stored.fields([field.name for field in fields(BurnIn)])
    sums = None if found["sums"].value is None else found["sums"].tensor((2,)).to(device)
    epochs = tuple(one.number() for one in found["epochs"].entries())
    return BurnIn(epochs, sums, found["over"].flag())


def _start(stored: Stored, device: torch.device) -> tuple[Tensor | dict[str, float], Tensor]:
    """δ and σ with which a tuner began."""
    delta, sigma = stored.entries(2)
    if isinstance(delta.value, Mapping):
        numbers = {name: one.number() for name, one in delta.items().items()}
        given = given_precision(numbers, device)
    else:
        given = given_precision(delta.tensor(), device)
        if delta.value.ndim > 1 or not delta.value.numel():
            raise delta.fault("one precision, or a list of them", tuple(delta.value.shape))
    return given, positive(sigma.tensor(()), "sigma_noise", device)


def _record(stored: Stored, likelihood: Likelihood) -> Record:
    """One record; hyperparameters are positive tensors, all else are numbers."""
    held = stored.items()
    if "constant_evidence" not in held:  # an older record
        none = torch.full(
            (len(held["groups"].texts()),), math.nan, dtype=torch.float64, device="cpu"
        )
        later = {"effective_dimensions": none, "constant_evidence": math.nan}
        stored = Stored({**stored.value, **later}, stored.where)
    if "shared" not in held:  # likewise
        stored = Stored({**stored.value, "shared": False}, stored.where)
    found = stored.fields([field.name for field in fields(Record)])
    values: dict[str, Any] = {name: one for name, one in found.items()}
    for field in fields(Record):
        one = found[field.name]
        if field.name == "hyperparameters":
            tuned = one.fields(Hyperparameters.tuned(likelihood))
            values[field.name] = {name: inner.tensor().clone() for name, inner in tuned.items()}
        elif field.name == "groups":
            values[field.name] = one.texts()
        elif field.name == "shared":
            values[field.name] = one.flag()
        elif field.name == "effective_dimensions":
            shape = (len(found["groups"].texts()),)
            if not isinstance(one.value, Tensor) or one.value.shape != shape:
                raise one.fault("one γ for each group is needed")
            values[field.name] = one.value.double().clone()  # NaN in older records
        else:
            values[field.name] = one.whole() if field.type in (int, "int") else one.number()
            if math.isnan(values[field.name]) and field.name != "constant_evidence":
                raise one.fault("not a number")
    return Record(**values)


def _adam(stored: Stored, hyper: Hyperparameters, tuned: Sequence[str]) -> dict[str, Any] | None:
    """Adam's state, of moments shaped as the hyperparameters that it moved."""
    if stored.value is None:
        return None
    found = stored.fields(("state", "param_groups"))
    (group,) = found["param_groups"].entries(1)
    if [*group.items()["params"].wholes()] != [*range(len(tuned))]:
        raise group.fault("not the hyperparameters that were tuned")
    _check_adam_options(group)
    moments = found["state"].value
    # Those of precisions may be missing: where some are new, as after unfreezing.
    every = [*range(len(tuned))]
    others = [k for k in every if tuned[k] != "prior_precision"]
    if not isinstance(moments, Mapping) or [*moments] not in ([], every, others):
        raise found["state"].fault("moments of other hyperparameters")
    for k in moments:
        own = Stored(moments[k], f"{stored.where}.state.{k}").fields(
            ("step", "exp_avg", "exp_avg_sq")
        )
        shape = tuple(getattr(hyper, tuned[k]).shape)
        own["step"].tensor(())
        own["exp_avg"].tensor(shape)
        if bool((own["exp_avg_sq"].tensor(shape) < 0).any()) or float(own["step"].value) < 0:
            raise own["exp_avg_sq"].fault("steps and means of squares are ≥ 0")
    return copy.deepcopy(stored.value)


def _check_adam_options(group: Stored) -> None:
    """Raise `InvalidValue` unless Adam's options are some."""
    options = group.items()
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in options:
            raise group.fault("an entry is missing", f"no {name}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= options[name].number() < math.inf:
            raise options[name].fault("must be ≥ 0 and finite")
    for beta in options["betas"].entries(2):
        if not 0 <= beta.number() < 1:
            raise beta.fault("must be ≥ 0 and below 1")


def name_of(objective: AnyObjective) -> str | None:
    """What an objective is called, or None for a function of the user's own."""
    return next((name for name, known in NAMED.items() if known is objective), None)


def check_goal(
    found: Mapping[str, Stored], tuned: Sequence[str], tune: Tune, objective: AnyObjective
) -> None:
    """Raise `InvalidValue` where a state tuned other things, or by another objective.

    Records of different objectives have no best, and Adam's moments belong to what they moved.
    """
    if [*found["tuned"].texts()] != [*tuned]:
        theirs = [*found["tuned"].texts()]
        raise _other("fix_sigma_noise", f"{theirs} tuned in the state, {[*tuned]} here")
    if found["tune"].value != tune:
        raise _other("tune", f"{found['tune'].value!r} in the state, {tune!r} here")
    theirs, mine = found["objective"].value, name_of(objective)
    if theirs is not None:
        check_choice("state.objective", theirs, NAMED)
    if theirs != mine:
        raise _other(
            "objective", f"{theirs or 'a function'} in the state, {mine or 'a function'} here"
        )


def _other(option: str, got: str) -> InvalidValue:
    """The error for a state of another option."""
    return InvalidValue(
        "the state was made with another option",
        where=option,
        got=got,
        remedy="Make the tuner with the options of the state's",
    )
