"""Rounds without a pass over the data: curvature that the optimiser averages while it trains.

The optimiser has Kronecker factors of layers. What it has not, blocks of norms and embeddings, and
what is known of the targets, are those of the last round with a pass; the log-likelihood comes from
the losses of the epoch, in training mode and under moving weights.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.fisher import Empirical
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.marglik.decay import largest_decay
from kfac_laplace.posterior.claims import Claim
from kfac_laplace.states.plain import same


@runtime_checkable
class AveragesCurvature(Protocol):
    """An optimiser that knows the curvature of what it trains: `kfac_laplace.optim.KFAC`."""

    param_groups: list[dict[str, Any]]

    @property
    def model(self) -> nn.Module:
        """The network that it trains, out of its wrappers."""
        ...

    @property
    def options(self) -> CurvatureOptions:
        """Those of its curvature."""
        ...

    def curvature(self, n_data: int) -> Curvature:
        """The curvature of so many examples, of the groups that it has factors of."""
        ...


@dataclass(frozen=True)
class EpochFit:
    """How well the outputs of an epoch fitted, batch by batch.

    Args:
        statistic: the likelihood's sum over them, float64; None before the first batch.
        rows: number of their output rows, float64 (), on the same device.
    """

    statistic: Tensor | None = None
    rows: Tensor | None = None

    def with_batch(self, statistic: Tensor, rows: int) -> "EpochFit":
        """With a batch more; the device is not waited for. Batches of no finite loss do not count.

        Args:
            statistic: of the batch.
            rows: its number of output rows.
        """
        own = statistic.detach().double()
        counts = own.isfinite().all()
        own, n = torch.where(counts, own, 0.0), torch.where(counts, float(rows), 0.0).double()
        if self.statistic is None or self.rows is None:
            return EpochFit(own, n)
        return EpochFit(self.statistic.to(own.device) + own, self.rows.to(n.device) + n)

    def of(self, n_rows: float) -> Tensor:
        """The statistic of so many rows that fit as these did on average.

        Raises:
            InvalidValue: there were none.
        """
        if self.statistic is None or self.rows is None or not float(self.rows):
            raise _asks_for_loader("no loss was computed in this epoch, from which it goes")
        return self.statistic * (n_rows / self.rows)


# --- what is shared ------------------------------------------------------------------------------


def check_shares(
    optimizer: AveragesCurvature, network: Network, options: CurvatureOptions, tracked: set[str]
) -> None:
    """Raise `InvalidValue` where an optimiser's curvature is not that of a tuner's rounds.

    Args:
        optimizer: the optimiser.
        network: the model that the tuner tunes.
        options: of the tuner's curvature.
        tracked: names of the parameters with prior precisions.

    Raises:
        InvalidType: it averages no curvature.
    """
    if not isinstance(optimizer, AveragesCurvature):
        raise InvalidType(
            "no optimiser that averages curvature",
            where="curvature",
            got=type(optimizer).__name__,
            remedy="Pass a kfac_laplace.optim.KFAC",
        )
    theirs = optimizer.options
    if optimizer.model is not network.model:
        got, remedy = "an optimiser of another model", "Give both the same model"
    elif not same(theirs.loss, options.loss):
        names = [type(one.likelihood).__name__ for one in (theirs, options)]
        got = f"{names[0]} in the optimiser, {names[1]} here, or with other options"
        remedy = "Give both the same likelihood"
    elif isinstance(theirs.fisher, Empirical) and not isinstance(options.fisher, Empirical):
        got = "the empirical Fisher, whose trace is too low by a third and more"
        remedy = "Make the optimiser with Estimate(fisher='mc')"
    elif options.hessian_structure != "kron" or not options.joint_bias:
        got = f"hessian_structure={options.hessian_structure!r}, joint_bias={options.joint_bias}"
        remedy = "Kronecker factors of layers with their biases are what can be shared"
    elif decays := largest_decay(optimizer, network.model, tracked):
        got = f"weight_decay={decays} in the optimiser, where the prior is the weight decay"
        remedy = "Make it with weight_decay=0"
    else:
        return
    raise InvalidValue(
        "not the curvature of the tuner's loss", where="curvature", got=got, remedy=remedy
    )


def last_pass(ggn: GGN, optimizer: AveragesCurvature, options: CurvatureOptions) -> GGN:
    """What rounds without a pass take from one: all but the blocks that the optimiser has.

    Args:
        ggn: of the pass.
        optimizer: the optimiser.
        options: those of the tuner.
    """
    averaged = _averaged(ggn, optimizer)
    blocks = {name: block for name, block in ggn.blocks.items() if name not in averaged}
    return replace(ggn, options=options, blocks=blocks)


def shared_ggn(
    optimizer: AveragesCurvature, last: GGN | None, known: Knowledge, fit: EpochFit
) -> GGN:
    """The GGN of as many examples as the last pass saw, by the optimiser's averages.

    Args:
        optimizer: the optimiser.
        last: what `last_pass` kept, None before the first.
        known: the groups as they are now.
        fit: of the epoch.

    Raises:
        InvalidValue: no pass over the data was made with these groups, or no loss computed.
        NotFitted: the optimiser has captured nothing yet.
    """
    if last is None or _layouts(last.knowledge) != _layouts(known):
        raise _asks_for_loader("no pass over the data was made with these parameters yet")
    statistic = fit.of(last.n_rows)
    made = optimizer.curvature(int(last.n_data)).ggn
    layouts = _layouts(known)
    averaged = {n: b for n, b in made.blocks.items() if layouts.get(n) == b.layout}
    blocks: dict[str, Block] = {**last.blocks, **averaged}
    if missing := [name for name in layouts if name not in blocks]:
        raise _asks_for_loader(
            f"neither the optimiser nor the last pass has a block of {', '.join(missing)}"
        )
    settings = {**last.settings, **{name: made.settings[name] for name in averaged}}
    ordered = {name: blocks[name] for name in layouts}
    return replace(last, settings=settings, blocks=ordered, statistic=statistic)


def settings_claim(shared: GGN, last: GGN) -> list[Claim]:
    """What to say where the optimiser expands what passes reduce, or the reverse."""
    names = [n for n, setting in shared.settings.items() if last.settings.get(n) != setting]
    if not names:
        return []
    told = ", ".join(f"{n} ({shared.settings[n]}, not {last.settings.get(n)})" for n in names)
    return [
        Claim(
            "settings",
            tuple(names),
            f"the optimiser's factors are by other settings than rounds with a pass: {told}. "
            "Precisions move to and fro between the two: give both the same kfac_approx",
        )
    ]


def _averaged(ggn: GGN, optimizer: AveragesCurvature) -> set[str]:
    """Names of the groups of which the optimiser has factors."""
    try:
        made = optimizer.curvature(1).blocks
    except NotFitted:
        return set()
    layouts = _layouts(ggn.knowledge)
    return {name for name, block in made.items() if layouts.get(name) == block.layout}


def _layouts(known: Knowledge) -> dict[str, Any]:
    return {group.name: group.layout for group in known.groups}


def _asks_for_loader(why: str) -> InvalidValue:
    return InvalidValue(
        f"this round needs a pass over the data: {why}",
        where="loader",
        got=None,
        remedy="Pass the training loader",
    )
