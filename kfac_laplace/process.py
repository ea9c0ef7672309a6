"""What a process has once, and its threads share: whose turn it is, and settings of all of them.

Python and torch keep generators, the choice of attention kernels and filters of warnings for the
whole process. Two threads that each put such a thing back as they found it leave what one of them
had set, if they overlap.
"""

import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.devices import CPU, is_other, random_state, set_random_state


class Turns:
    """Things that one thread has at a time; it may ask again for what it has."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owners: dict[Hashable, int] = {}
        _around_forks(self._free.acquire, self._free.release, self._begin_child)

    @contextmanager
    def of(self, things: Iterable[Hashable]) -> Iterator[None]:
        """Wait until no other thread has one of these, and have them all inside."""
        me, things = threading.get_ident(), set(things)
        with self._free:
            self._free.wait_for(lambda: all(self._owners.get(t, me) == me for t in things))
            new = [thing for thing in things if thing not in self._owners]
            self._owners.update(dict.fromkeys(new, me))
        try:
            yield
        finally:
            with self._free:
                for thing in new:
                    self._owners.pop(thing, None)
                self._free.notify_all()

    def unless_taken(self, thing: Hashable, act: Callable[[], object]) -> None:
        """Do this now, or not at all where another thread has that."""
        me = threading.get_ident()
        with self._free:
            if self._owners.get(thing, me) == me:
                act()

    def _begin_child(self) -> None:
        """A forked process has one thread: what the others had is free."""
        me = threading.get_ident()
        self._owners = {thing: owner for thing, owner in self._owners.items() if owner == me}
        self._free.release()


class Shared:
    """A context of the process: the first thread that enters opens it, the last one closes it.

    Args:
        opened: makes the context.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[Any]]):
        self._opened = opened
        self._lock = threading.RLock()
        self._inside: list[int] = []  # the threads, as often as they have entered
        self._stack = ExitStack()
        _around_forks(self._lock.acquire, self._lock.release, self._begin_child)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside it holds."""
        me = threading.get_ident()
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self._opened())
            self._inside.append(me)
        try:
            yield
        finally:
            self._leave(me)

    def _leave(self, thread: int) -> None:
        with self._lock:
            self._inside.remove(thread)
            if not self._inside:
                self._stack.close()

    def _begin_child(self) -> None:
        """A forked process has one thread: the others are no longer inside."""
        try:
            me = threading.get_ident()
            for thread in [one for one in self._inside if one != me]:
                self._leave(thread)
        finally:
            self._lock.release()


def _around_forks(
    before: Callable[[], object], parent: Callable[[], object], child: Callable[[], object]
) -> None:
    """Have these called around each fork of the process, where the system knows forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=parent, after_in_child=child)


TURNS = Turns()
#: Whoever reseeds the global generators, changes the filters of warnings, or is inside torch's
#: forward-mode derivatives, whose levels are counted for the whole process, is so alone.
GENERATORS, FILTERS, FORWARD_MODE = "generators", "filters of warnings", "forward mode"


@contextmanager
def own_warnings() -> Iterator[None]:
    """`warnings.catch_warnings` in one thread at a time: filters are put back after."""
    with TURNS.of([FILTERS]), warnings.catch_warnings():
        yield


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """One thread at a time, which may seed all generators inside, and puts them back itself."""
    with TURNS.of([GENERATORS]), _states_kept(_devices(device)):
        yield


@contextmanager
def draws_kept(device: torch.device | None = None) -> Iterator[None]:
    """Torch's global random states are put back after; from its own a `DataLoader` draws a seed.

    Args:
        device: whose state it is, beside that of the CPU.
    """
    devices = _devices(device)
    with _states_kept(devices):
        before = {one: random_state(one) for one in devices}
        try:
            yield
        finally:  # where another thread has seeds of its own, the last to leave puts all back
            TURNS.unless_taken(GENERATORS, partial(set_states, before))


def _devices(device: torch.device | None) -> list[torch.device]:
    """Whose states a pass on this device may change."""
    return [CPU, device] if device is not None and is_other(device) else [CPU]


@contextmanager
def _states_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """When the last thread leaves, torch's states are what the first one found."""
    with ExitStack() as stack:
        for device in devices:
            if device not in _SHARED:
                _SHARED.setdefault(device, Shared(partial(_kept, device)))
            stack.enter_context(_SHARED[device].entered())
        yield


_SHARED: dict[torch.device, Shared] = {}


@contextmanager
def _kept(device: torch.device) -> Iterator[None]:
    before = {device: random_state(device)}
    try:
        yield
    finally:
        set_states(before)


def set_states(states: Mapping[torch.device, Tensor]) -> None:
    """Set torch's random states, by device."""
    for device, state in states.items():
        set_random_state(device, state)
