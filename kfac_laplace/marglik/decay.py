"""Weight decay of the optimiser, which beside the prior of the loss would be a second prior."""

import logging
import weakref
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

log = logging.getLogger("kfac_laplace")


class HasParamGroups(Protocol):
    """What torch's optimisers have."""

    param_groups: list[dict[str, Any]]


def largest_decay(optimizer: HasParamGroups, model: nn.Module, tracked: Collection[str]) -> float:
    """The largest weight decay that an optimiser gives a parameter with a prior precision.

    Args:
        optimizer: the optimiser.
        model: the network.
        tracked: names of the parameters with prior precisions.
    """
    own = {id(p) for name, p in model.named_parameters() if name in tracked}
    groups = [group for group in optimizer.param_groups if _any_of(group["params"], own)]
    return max((_as_number(group.get("weight_decay")) for group in groups), default=0.0)


class _Looks:
    """What looks at each step of any optimiser, by one hook of torch's.

    The hook stays once it is there: torch goes through its hooks at each step, and an optimiser of
    another thread fails where they change meanwhile. Single changes of a dict are safe.
    """

    def __init__(self) -> None:
        self._looks: dict[object, Callable[[Optimizer], None]] = {}
        self._hooked = False

    def __len__(self) -> int:
        """How many look."""
        return len(self._looks)

    def add(self, look: Callable[[Optimizer], None]) -> Callable[[], object]:
        """Have this called with each optimiser that is about to step; what ends it."""
        key = object()
        self._looks[key] = look
        if not self._hooked:
            self._hooked = True
            register_optimizer_step_pre_hook(self._tell)
        return partial(self._looks.pop, key, None)

    def _tell(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for look in list(self._looks.values()):
            look(optimizer)


LOOKS = _Looks()


class DecayWatch:
    """Sees the optimisers of a network at their first steps, and warns where one decays weights.

    A loop hands its optimiser to nobody; torch tells of each optimiser's step. What is watched is
    the time from the first loss to the end of the first epoch.
    """

    def __init__(self) -> None:
        self._remove: Callable[[], object] | None = None
        self._ended = False

    def watch(self, model: nn.Module, tracked: Collection[str]) -> None:
        """Begin to watch, unless that was done before.

        Args:
            model: the network.
            tracked: names of the parameters with prior precisions.
        """
        if self._remove is not None or self._ended:
            return
        seen = weakref.WeakSet[Optimizer]()
        look = partial(_look, weakref.ref(model), frozenset(tracked), seen)
        self._remove = LOOKS.add(look)
        weakref.finalize(model, self._remove)

    def end(self) -> None:
        """Watch no longer."""
        self._ended = True
        if self._remove is not None:
            self._remove()
            self._remove = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins anew: hooks of torch cannot be copied."""
        return DecayWatch, ()


def _look(
    model: "weakref.ref[nn.Module]",
    tracked: frozenset[str],
    seen: "weakref.WeakSet[Optimizer]",
    optimizer: Optimizer,
) -> None:
    """Warn where an optimiser that is about to step decays weights that have a prior."""
    found = model()
    if found is None or optimizer in seen:
        return
    seen.add(optimizer)
    if decay := largest_decay(optimizer, found, tracked):
        log.warning(
            "%s has weight_decay=%g beside the prior, which is the weight decay of the loss: the "
            "weights are drawn to zero twice, and the evidence knows of one. Make it with "
            "weight_decay=0",
            type(optimizer).__name__,
            decay,
        )


def _as_number(decay: Any) -> float:
    """A weight decay; 0 where an optimiser means something else by the word."""
    try:
        return float(decay)
    except (TypeError, ValueError):
        return 0.0


def _any_of(params: Iterable[Any], own: set[int]) -> bool:
    return any(id(p) in own for p in params)
