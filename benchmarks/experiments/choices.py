"""Kinds of command-line options."""

import argparse
from collections.abc import Callable, Sequence


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """What reads NAME,NAME of known names."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are {', '.join(known)}"
            )
        return found

    return read


def numbers(text: str) -> list[int]:
    """What reads N,N."""
    return [int(part) for part in text.split(",")]
