"""What processes agree on before each reads its part of the data: all that curvature is of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kfac_laplace.curvature.batch_digest import digest
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.model.fingerprint import bit_sums
from kfac_laplace.curvature.model.graphs import is_graph
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import same


@dataclass(frozen=True)
class Opening:
    """What a rank has learned from its first batch; None of it where there is no batch.

    Args:
        binding: structure, likelihood and estimator.
        weights: `bit_sums` of the model.
        counted: examples seen before.
        knowledge: groups, and how rows lie.
        settings: expand or reduce, by group.
        digest: of the batch; None where nothing in it can be read, or it was read before.
    """

    binding: tuple[Any, ...]
    weights: Mapping[str, int]
    counted: float
    knowledge: Knowledge | None = None
    settings: Mapping[str, Setting] | None = None
    digest: int | None = None

    @classmethod
    def of(
        cls, ggn: GGN, before: GGN, model: nn.Module, batch: tuple[Any, Tensor] | None
    ) -> "Opening":
        """What there is to tell.

        Args:
            ggn: of the first batch, of those before an interruption, or of none.
            before: of what was seen before.
            model: at its mode.
            batch: the first batch; None where there is none, and where it was read before.
        """
        told = cls((*ggn.options.binding, ggn.options.fisher), bit_sums(model), before.n_data)
        if not ggn.blocks:
            return told
        known = replace(ggn.knowledge, effective=frozenset())
        mark = None if batch is None else _digest(batch)
        return replace(told, knowledge=known, settings=dict(ggn.settings), digest=mark)


def settled(openings: Sequence[Opening], own: GGN) -> GGN | None:
    """What all ranks go by, as the first of them with data learned it, as a GGN of no data.

    Args:
        openings: of all ranks.
        own: of this rank's first batch, or of none.

    Returns:
        None where this rank's own is that already.

    Raises:
        InvalidValue: no rank has data, all began with the same batch, or they have different
            weights, likelihoods, structures, estimators or earlier data.
    """
    for rank, other in enumerate(openings):
        _check_alike(openings[0], rank, other)
    filled = [each for each in openings if each.knowledge is not None]
    if not filled:
        raise InvalidValue(
            "no rank's loader yielded a batch",
            where="train_loader",
            got="0 batches",
            remedy="Check their lengths; a generator can be read only once",
        )
    marks = {each.digest for each in filled}
    if len(filled) > 1 and len(marks) == 1 and None not in marks:
        raise InvalidValue(
            "all ranks began with the same batch, which would count once for each of them",
            where="train_loader",
            remedy="Give each rank its own part of the data, as "
            "torch.utils.data.DistributedSampler makes it",
        )
    first = filled[0]
    assert first.knowledge is not None and first.settings is not None
    axes = own.knowledge.axis, first.knowledge.axis
    alike = (
        bool(own.blocks)
        and same(own.settings, first.settings)
        and same(own.knowledge.groups, first.knowledge.groups)
        and (None in axes or axes[0] == axes[1])
    )
    return None if alike else GGN(own.options, first.knowledge, first.settings, bases=own.bases)


def _check_alike(one: Opening, rank: int, two: Opening) -> None:
    """Raise `InvalidValue` where two ranks' curvatures cannot be added."""
    got: object = None
    if not same(one.binding, two.binding):
        what, remedy = "structures, likelihoods or estimators", "Give all the same options"
    elif one.counted != two.counted:
        what, got = "data seen before", f"{one.counted:g} and {two.counted:g} examples"
        remedy = "Fit anew on all ranks"
    elif one.weights != two.weights:
        what = "weights or buffers"
        names = [*one.weights, *(name for name in two.weights if name not in one.weights)]
        got = next(name for name in names if one.weights.get(name) != two.weights.get(name))
        remedy = (
            "Send those of one rank to all: for tensor in [*model.parameters(), "
            "*model.buffers()]: torch.distributed.broadcast(tensor.data, 0). Statistics of batch "
            "norms differ after training even under DistributedDataParallel"
        )
    else:
        return
    raise InvalidValue(
        f"ranks 0 and {rank} have different {what}", where="process_group", got=got, remedy=remedy
    )


def other_ranks_went_on() -> InvalidValue:
    """The error of a rank whose checkpoint is of a pass that went by something else."""
    return InvalidValue(
        "the checkpoints of the ranks are of different fits",
        where="checkpoint",
        remedy="Begin anew on all ranks, with paths that no other fit has used",
    )


def _digest(batch: tuple[Any, Tensor]) -> int | None:
    """By what a batch is known again; None where nothing can be read in its inputs."""
    x, _ = batch
    readable = any(isinstance(leaf, Tensor) for leaf in tree_leaves(x)) or is_graph(x)
    return digest(batch) if readable else None
