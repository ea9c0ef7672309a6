"""What the library warns of while a cell runs, kept with what came out of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("kfac_laplace")


class Kept(logging.Handler):
    """Warnings in the order in which they were first said.

    Args:
        messages: where they are put.
    """

    def __init__(self, messages: list[str]):
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message that is new."""
        if (message := record.getMessage()) not in self.messages:
            self.messages.append(message)


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """Collect the library's warnings instead of printing them."""
    messages: list[str] = []
    handler, passed_on = Kept(messages), LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    try:
        yield messages
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.propagate = passed_on
