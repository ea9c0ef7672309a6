"""Finished cells on disk: one JSON object a line, so that a killed run goes on where it was."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What names a cell: short strings, numbers and truth values.
Cell = Mapping[str, Any]
Key = tuple[tuple[str, Any], ...]


def key_of(cell: Cell) -> Key:
    """A cell as something to look up, whatever the order of its names."""
    return tuple(sorted(cell.items()))


@dataclass(frozen=True)
class Line:
    """A finished cell.

    Args:
        cell: what was run.
        found: what came out: numbers by name, and what else is worth keeping.
    """

    cell: Cell
    found: Mapping[str, Any]


class Lines:
    """The file of an experiment's finished cells.

    Args:
        path: JSON lines; need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Line]:
        """All finished cells in the order of their first end; of a cell's lines, the last counts.

        A last line without an end was cut off by a kill, and is left out.

        Raises:
            ValueError: another line that is no cell.
        """
        found = {key_of(line.cell): line for line in self._whole()}
        return list(found.values())

    def _whole(self) -> Iterator[Line]:
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, text in enumerate(content.split(b"\n")[:-1], 1):
            try:
                line = json.loads(text)
                yield Line(line["cell"], line["found"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: no finished cell ({text[:60]!r}). Remove the line"
                ) from error

    def append(self, line: Line) -> None:
        """Add a cell, in one write; what a kill left of another is removed first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut()
        text = json.dumps({"cell": dict(line.cell), "found": dict(line.found)})
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            left = memoryview(text.encode() + b"\n")
            while left:  # a signal or a full disk may cut a write short
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)

    def _cut(self) -> None:
        """Remove a last line without an end."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)
