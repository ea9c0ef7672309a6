"""By what a fit is known again beside its data: options, the model's values, earlier data."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Generator

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.fingerprint import fingerprint
from kfac_laplace.curvature.model.unchanged import parameters_of
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import CHECKSUM, same, sealed
from kfac_laplace.states.stored import shown

REMEDY = (
    "Go on with the model, data and options of the fit that wrote it, or begin anew: "
    "Checkpoint(path).remove()"
)


class Counting(Protocol):
    """What counts batches: a `Curvature`."""

    ggn: GGN
    generator: Generator
    options: CurvatureOptions
    network: Network


def bound_to(of: Counting, key_y: str) -> dict[str, Any]:
    """All that a fit which goes on must share with the one that was interrupted, the data aside."""
    model, ggn = of.network.model, of.ggn
    before = {
        "blocks": {name: block.tensors() for name, block in ggn.blocks.items()},
        "bases": {name: list(bases) for name, bases in ggn.bases.items()},
        "counts": [ggn.n_data, ggn.n_rows, ggn.n_outputs],
        "sums": [ggn.statistic, ggn.targets],
        "draws": of.generator.get_state(),
    }
    return {
        "options": {**of.options.to_plain(), "key_y": key_y},
        "kinds": [type(of.options.likelihood).__name__, type(of.options.fisher).__name__],
        "model": fingerprint(model, {}),
        "parameters": {n: [p.dtype, p.requires_grad] for n, p in parameters_of(model).items()},
        "before": sealed(before)[CHECKSUM],
    }


def check_bound(stored: Any, own: Mapping[str, Any]) -> None:
    """Raise `InvalidValue` at the first thing in which two fits differ."""
    for name, mine in own["options"].items():
        theirs = stored["options"].get(name)
        if not same(_in_order(theirs), _in_order(mine)):
            got = f"{shown(theirs)} in the checkpoint, {shown(mine)} here"
            raise _other_fit("another option", name, got)
    if not same(stored["kinds"], own["kinds"]):
        got = f"{stored['kinds']} in the checkpoint, {own['kinds']} here"
        raise _other_fit("another likelihood or estimator", "checkpoint", got)
    for what in ("model", "parameters"):
        for name in {**own[what], **stored[what]}:
            mine, theirs = own[what].get(name), stored[what].get(name)
            if not same(mine, theirs):
                raise _other_fit("another model, or other weights", name, _differing(theirs, mine))
    if stored["before"] != own["before"]:
        raise _other_fit("other data counted before it", "checkpoint", None)


def _differing(theirs: Any, mine: Any) -> str:
    """What is different about a parameter or a buffer."""
    if theirs is None or mine is None:
        return "no such tensor in the checkpoint" if theirs is None else "no such tensor here"
    if isinstance(mine, Mapping):
        if theirs["shape"] != mine["shape"]:
            return f"shape {tuple(theirs['shape'])} in the checkpoint, {tuple(mine['shape'])} here"
        return "other values"
    (dtype, trained), (own, trains) = theirs, mine
    if dtype != own:
        return f"{dtype} in the checkpoint, {own} here"
    return f"requires_grad={trained} in the checkpoint, {trains} here"


def _in_order(value: Any) -> Any:
    """Mappings as pairs: of patterns the first that matches counts."""
    return [*value.items()] if isinstance(value, Mapping) else value


def _other_fit(what: str, where: str, got: str | None) -> InvalidValue:
    return InvalidValue(
        f"the checkpoint is of a fit with {what}", where=where, got=got, remedy=REMEDY
    )
