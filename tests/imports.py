"""What the files of a package take from each other, read from their source and never run.

Imports for type checkers and inside functions count: whoever reads a file has to follow them too.
Files go by their paths in the package, without the suffix: "curvature/ggn", "__init__".
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: File to the files that it names in its imports.
Arrows = Mapping[str, set[str]]


@dataclass(frozen=True)
class Import:
    """One name that an import statement binds.

    Args:
        module: what is imported, absolute and dotted.
        taken: what is taken of it; None for the module itself.
        name: what it is called from then on.
    """

    module: str
    taken: str | None
    name: str


def imported(source: str, folder: str) -> Iterator[Import]:
    """Every import of a file in a package `folder` (dotted), at any depth, as it is written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = folder.split(".")
            start = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, alias.name, alias.asname or alias.name)


class Sources:
    """The files of a package.

    Args:
        package: its folder.
    """

    def __init__(self, package: Path):
        paths = sorted(package.rglob("*.py"))
        self._name = package.name
        self._text = {
            path.relative_to(package).with_suffix("").as_posix(): path.read_text("utf-8")
            for path in paths
        }
        self.files = list(self._text)
        self._file_of = {self._dotted(file): file for file in self.files}

    def imports(self, file: str) -> list[Import]:
        """The imports of a file; a module taken from its package is the module itself."""
        folder = ".".join([self._name, *file.split("/")[:-1]])
        found = []
        for one in imported(self._text[file], folder):
            whole = f"{one.module}.{one.taken}"
            found.append(Import(whole, None, one.name) if whole in self._file_of else one)
        return found

    def arrows(self) -> Arrows:
        """The files that each file names in its imports."""
        return {
            file: {
                self._file_of[one.module]
                for one in self.imports(file)
                if one.module in self._file_of
            }
            for file in self.files
        }

    def private(self, file: str) -> set[str]:
        """Names with a leading underscore that a file takes from other files."""
        own = [one for one in self.imports(file) if one.module in self._file_of]
        found = {f"{one.module}.{one.taken}" if one.taken else one.module for one in own}
        modules = {one.name: one.module for one in own if one.taken is None}
        for node in ast.walk(ast.parse(self._text[file])):
            if isinstance(node, ast.Attribute):
                owner = modules.get(ast.unparse(node.value))
                found |= {f"{owner}.{node.attr}"} if owner else set()
        return {name for name in found if any(_is_private(part) for part in name.split("."))}

    def _dotted(self, file: str) -> str:
        parts = [self._name, *file.split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(arrows: Arrows) -> list[list[str]]:
    """Sets of files each of which leads to all others of the set and back to itself."""
    reached = {file: _reached(arrows, file) for file in arrows}
    found = {
        tuple(other for other in arrows if other in reached[file] and file in reached[other])
        for file in arrows
        if file in reached[file]
    }
    return [list(circle) for circle in sorted(found)]


def room_of(file: str, rooms: Sequence[str]) -> str | None:
    """The room with the longest name that the file is or lies in."""
    around = [room for room in rooms if f"{file}/".startswith(f"{room}/")]
    return max(around, key=len, default=None)


def uphill(arrows: Arrows, rooms: Sequence[str]) -> list[tuple[str, str]]:
    """Arrows from a file to one whose room comes after its own."""
    floors = {
        file: rooms.index(room) for file in arrows if (room := room_of(file, rooms)) is not None
    }
    return sorted(
        (file, target)
        for file, targets in arrows.items()
        for target in targets
        if file in floors and target in floors and floors[file] < floors[target]
    )


def _reached(arrows: Arrows, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = arrows[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")
