"""All that changes while a tuner is used, as plain data and back."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.plain_groups import groups_to_plain, knowledge_of_groups
from kfac_laplace.curvature.state import settings_of
from kfac_laplace.marglik.grouping import Grouping
from kfac_laplace.marglik.progress import Progress
from kfac_laplace.marglik.record import Record
from kfac_laplace.marglik.shared import EpochFit
from kfac_laplace.marglik.shared_state import (
    epoch_fit_from_plain,
    last_pass_from_plain,
    last_pass_to_plain,
)
from kfac_laplace.marglik.standing import Setup, Standing
from kfac_laplace.marglik.state import KEYS, LATER, check_goal, name_of, resumed, training_to_plain
from kfac_laplace.posterior.state import check_options, check_same_sharing
from kfac_laplace.states.plain import check_seal, sealed
from kfac_laplace.states.stored import FORMAT, Stored, opened, refusing_damage


@dataclass(frozen=True)
class Snapshot:
    """All that changes while a tuner is used.

    Args:
        standing: where it stands.
        progress: of training.
        history: records of the rounds so far.
        constant: loss of the best constant prediction in the last round, None before the first.
        last_pass: what rounds without a pass take from the last one.
    """

    standing: Standing
    progress: Progress
    history: list[Record]
    constant: float | None
    last_pass: GGN | None

    def to_plain(self, setup: Setup) -> dict[str, Any]:
        """Tensors and plain data, sealed."""
        at, progress, groups = self.standing, self.progress, self.standing.groups
        known, prior, shared = groups.known, groups.prior, None
        if setup.optimizer is not None:
            last = last_pass_to_plain(self.last_pass)
            shared = {"last_pass": last, "epoch": asdict(progress.fit)}
        return sealed(
            {
                "format": FORMAT,
                "options": setup.plain_options(),
                "sharing": None if prior is None else prior.digest,
                "hyperparameters": asdict(at.hyper),
                "tuned": list(setup.free),
                "tune": groups.tune,
                "objective": name_of(setup.objective),
                "adam": copy.deepcopy(at.moments),
                "epoch": progress.epoch,
                "history": [asdict(record) for record in self.history],
                "groups": None if prior is None else groups_to_plain(known.groups),
                "patterns": at.patterns,
                "class_axis": known.axis,
                "start": list(at.start),
                "burn_in": asdict(progress.burn_in),
                "outputs": progress.outputs,
                "left_start": progress.left_start,
                "then": progress.then,
                "modes": list(progress.modes.values()),
                "began": dict(groups.began),
                "training": training_to_plain(groups.training),
                "settings": dict(groups.settings),
                "constant": self.constant,
                "shared": shared,
            }
        )

    @classmethod
    def from_plain(cls, state: Mapping[str, Any], setup: Setup, now: Grouping) -> "Snapshot":
        """The inverse, for a tuner of the same options.

        Args:
            state: tensors and plain data.
            setup: of the tuner.
            now: today's groups.

        Raises:
            InvalidValue: not a tuner's state, one of another version, model or option, a damaged or
                changed one.
        """
        network, rows = setup.network, now.known
        now = replace(now, prior=None, settings={})
        with refusing_damage():
            found = opened(state, KEYS, "a tuner", LATER)
            remedy = "Make the tuner with the stored options"
            check_options(found["options"], setup.plain_options(), remedy)
            check_goal(found, setup.free, now.tune, setup.objective)
            read = resumed(found, setup.options.likelihood, network.device)
            if read.groups is not None:
                now = now.grouped(knowledge_of_groups(read.groups, network, setup.options))
                assert now.prior is not None
                now.prior.full(read.hyper.prior_precision)
                check_same_sharing(now.prior, found["sharing"].text())
                if found["settings"].value:  # decided
                    now = replace(now, settings=settings_of(found["settings"], read.groups))
            last, fit = _shared(found["shared"], setup, now if now.prior else None)
            check_seal(state, "state")
        known = now.known
        if read.class_axis is not None:
            known = replace(known, class_axis=read.class_axis, axis_known=True)
        known = known.with_rows_of(rows)
        groups = replace(now, known=known, began=read.began, training=read.training)
        modes = dict(zip(network.model.modules(), read.modes, strict=True)) if read.modes else {}
        return cls(
            Standing(read.hyper, groups, read.patterns, read.start, read.adam),
            Progress(
                read.burn_in, read.outputs, read.then, modes, fit, read.epoch, read.left_start
            ),
            read.history,
            read.constant,
            last,
        )


def _shared(stored: Stored, setup: Setup, now: Grouping | None) -> tuple[GGN | None, EpochFit]:
    """What a state has for rounds without a pass; nothing where there will be none."""
    if stored.value is None:
        return None, EpochFit()
    found, device = stored.fields(("last_pass", "epoch")), setup.network.device
    fit = epoch_fit_from_plain(found["epoch"], device)
    known, settings = (None, {}) if now is None else (now.known, now.settings)
    last = last_pass_from_plain(found["last_pass"], known, setup.options, settings, device)
    return (last, fit) if setup.optimizer is not None else (None, EpochFit())
