"""What an experiment is, and how its missing cells are run."""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.data import MissingData
from benchmarks.experiments.lines import Cell, Line, Lines, key_of
from benchmarks.experiments.said import kept_warnings


@dataclass(frozen=True)
class Place:
    """Where cells run, which is no part of what they are.

    Args:
        device: as torch names it.
        data: folder of the data sets that no package ships.
    """

    device: str
    data: Path | None


@dataclass(frozen=True)
class Experiment:
    """A grid of cells.

    Args:
        name: of the command and of the file of results.
        about: one line for --help.
        options: adds the experiment's own options to a parser.
        cells: all cells that options ask for, in the order in which they shall run. Those that
            follow from what came out of others may be left out until these are finished.
        run: what comes out of a cell; the same for the same cell, up to rounding and the clock.
        report: Markdown from finished cells; figures go to a folder.
    """

    name: str
    about: str
    options: Callable[[argparse.ArgumentParser], None]
    cells: Callable[[argparse.Namespace], Iterable[Cell]]
    run: Callable[[Cell, Place], Mapping[str, Any]]
    report: Callable[[Sequence[Line], Path], str]


def chosen(cells: Iterable[Cell], only: Mapping[str, Sequence[str]]) -> list[Cell]:
    """The cells whose entries are among those asked for.

    Args:
        cells: all of them.
        only: allowed values by name of an entry, as text.

    Raises:
        ValueError: a name that no cell has, or a value.
    """
    found = list(cells)
    for name, values in only.items():
        known = {str(cell[name]) for cell in found if name in cell}
        if unknown := set(values) - known:
            raise ValueError(
                f"--only {name}: no cell with {', '.join(sorted(unknown))}; "
                f"there are {', '.join(sorted(known)) or 'none that have it'}"
            )
    return [
        cell
        for cell in found
        if all(str(cell.get(name)) in values for name, values in only.items())
    ]


def run_missing(
    experiment: Experiment, cells: Sequence[Cell], lines: Lines, place: Place
) -> list[Cell]:
    """Run the cells that are not finished; returns those that failed.

    What the library warns of is kept under "warnings". A cell that fails prints its traceback and
    leaves no line, so that the next run tries it again.
    Several processes may share a file where each has cells of its own.
    """
    failed = []
    done = {key_of(line.cell) for line in lines.read()}
    missing = [cell for cell in cells if key_of(cell) not in done]
    for number, cell in enumerate(missing, 1):
        title = " ".join(f"{name}={value}" for name, value in cell.items())
        print(f"{number}/{len(missing)} {title}", flush=True)
        try:
            with kept_warnings() as warnings:
                found = experiment.run(cell, place)
        except MissingData:
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            failed.append(cell)
            continue
        lines.append(Line(cell, {**found, **({"warnings": warnings} if warnings else {})}))
    return failed


def run_all(
    experiment: Experiment, cells: Callable[[], Sequence[Cell]], lines: Lines, place: Place
) -> list[Cell]:
    """Run what is missing, and then the cells that follow from it; returns those that failed.

    Args:
        experiment: whose cells they are.
        cells: all that are known by now; asked for again until there are no new ones.
        lines: the file of results.
        place: where to run.
    """
    failed, seen = [], set()
    while new := [cell for cell in cells() if key_of(cell) not in seen]:
        failed += run_missing(experiment, new, lines, place)
        seen |= {key_of(cell) for cell in new}
    return failed
