"""SIGTERM as schedulers send it: work that can be written ends at a whole step, not inside one."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

Handler = Callable[[int, FrameType | None], Any] | int | None


class Termination:
    """Inside it SIGTERM is noted in place of ending the process, until `deliver`.

    Only in the main thread, where Python lets handlers be set, and only where the signal would end
    the process or call a handler of Python's: one that is ignored stays so.
    """

    def __init__(self) -> None:
        self._previous: Handler = None
        self._process = os.getpid()
        #: Whether the signal has come.
        self.due = False

    def __enter__(self) -> Self:
        """Take the handler's place."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGTERM)
            if previous is not None and previous != signal.SIG_IGN:  # None: not Python's own
                self._previous = previous
                signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the handler back; a signal that came meanwhile does what it would have done."""
        due = self.due
        self._restore()
        if due:
            self._raise()

    def deliver(self) -> None:
        """Have a signal that came do what it would have done without us.

        That is the end of the process, unless a handler of the caller's own returns or raises.
        """
        handler = signal.getsignal(signal.SIGTERM)
        self._restore()
        self._raise()
        # The caller's handler has returned: the work goes on, and may be interrupted again.
        self._previous = signal.signal(signal.SIGTERM, handler)

    def _raise(self) -> None:
        self.due = False
        signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        """Put the handler back, unless somebody else has set another since."""
        if self._previous is not None and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, self._previous)
        self._previous = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.due = True
        if os.getpid() != self._process:  # a child that was forked meanwhile has nothing to write
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
