"""A GGN in the middle of a pass as plain data, and back: the next batch is added bit by bit alike.

`state.py` has what a finished one is read by. Here is beside it what batches have taught and the
next one goes by: which rows nothing reads, what was checked and what was told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Bases
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.knowledge import Knowledge, UseKey
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.state import ggn_from_state, ggn_to_state
from kfac_laplace.states.stored import Stored

#: What such data hold.
FIELDS = ("ggn", "knowledge", "bases")
KNOWLEDGE = (
    "settled",
    "unread",
    "unseen",
    "reorders",
    "listed",
    "effective",
    "told",
    "late",
    "checked",
    "looked",
)


def live_to_plain(ggn: GGN) -> dict[str, Any]:
    """All of a GGN but the options, the model and what lies in other memory than its tensors."""
    known = ggn.knowledge
    return {
        "ggn": _compact(ggn_to_state(ggn)),
        "knowledge": {
            "settled": sorted([list(params), list(nth)] for params, nth in known.settled),
            "unread": sorted(one.hex() for one in known.unread),
            "unseen": sorted(one.hex() for one in known.unseen),
            "reorders": known.reorders,
            "listed": known.listed,
            "effective": sorted(known.effective),
            "told": sorted(known.told),
            "late": sorted(known.late),
            "checked": known.interface.checked,
            "looked": known.interface.looked,
        },
        # Beside blocks they stand in these.
        "bases": {} if ggn.blocks else {name: list(one) for name, one in ggn.bases.items()},
    }


def _compact(value: Any) -> Any:
    """The same without the memory around views, which files would hold as well."""
    if isinstance(value, Mapping):
        return {key: _compact(inner) for key, inner in value.items()}
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def live_from_plain(stored: Stored, network: Network, options: CurvatureOptions) -> GGN:
    """The inverse, for the same model and options.

    Raises:
        InvalidValue: not such data, damaged ones, or those of another model or of other options.
    """
    found = stored.fields(FIELDS)
    ggn = ggn_from_state(found["ggn"], network, options)
    place = options.home(network.device) or network.device
    bases = {name: _bases(one, place) for name, one in found["bases"].items().items()}
    known = _knowledge(found["knowledge"], ggn.knowledge)
    return replace(ggn, knowledge=known, bases=bases or ggn.bases)


def _bases(stored: Stored, device: torch.device) -> Bases:
    left, right = stored.entries(2)
    return left.tensor().to(device), None if right.value is None else right.tensor().to(device)


def _knowledge(stored: Stored, known: Knowledge) -> Knowledge:
    """What batches have taught beside groups and rows."""
    found = stored.fields(KNOWLEDGE)
    interface = replace(
        known.interface, checked=found["checked"].whole(), looked=found["looked"].flag()
    )
    return replace(
        known,
        settled=frozenset(_use(entry) for entry in found["settled"].entries()),
        unread=_digests(found["unread"].texts()),
        unseen=_digests(found["unseen"].texts()),
        reorders=found["reorders"].flag(),
        listed=found["listed"].flag(),
        effective=frozenset(found["effective"].texts()),
        told=frozenset(found["told"].texts()),
        late=frozenset(found["late"].texts()),
        interface=interface,
    )


def _use(stored: Stored) -> UseKey:
    params, nth = stored.entries(2)
    kind, axes, turn = nth.entries(3)
    names = tuple(name.text() for name in params.entries())
    return names, (kind.text(), axes.whole(), turn.whole())


def _digests(texts: Iterable[str]) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(text) for text in texts)
