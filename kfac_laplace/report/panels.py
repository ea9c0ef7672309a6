"""What the pictures of a report show, as plain data: whoever draws them needs nothing else."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Form = Literal["points", "line", "outline", "dots", "bars"]


@dataclass(frozen=True)
class Curve:
    """Points of one line, outline or set of bars.

    Args:
        name: as the legend has it.
        colour: number of its colour; a way to predict has the same one everywhere.
        x: abscissae; of an outline the edges of its bins, one more than y.
        y: ordinates.
        filled: whether an outline is filled.
    """

    name: str
    colour: int
    x: list[float]
    y: list[float]
    filled: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: its heading.
        x: label of the abscissa.
        y: label of the ordinate.
        says: what it shows, in words with numbers.
        curves: what is drawn.
        form: points joined by lines, lines, outlines of histograms, dots or bars with names.
        labels: names of dots and bars, the first at the top.
        ideal: the line on which curves should lie: "diagonal", "one" or none.
        below: a smaller picture under it with the same abscissa.
        logarithmic: whether the axis of the numbers is: x of dots and bars, else y.
    """

    title: str
    x: str
    y: str
    says: str
    curves: list[Curve]
    form: Form = "line"
    labels: list[str] = field(default_factory=list)
    ideal: Literal["", "diagonal", "one"] = ""
    below: "Panel | None" = None
    logarithmic: bool = False


def merged(curves: list[Curve]) -> list[Curve]:
    """A curve for those that are the same, with the names of all: "mode = posterior"."""
    found: list[Curve] = []
    for curve in curves:
        for place, other in enumerate(found):
            if _alike(curve.x, other.x) and _alike(curve.y, other.y):
                name = f"{other.name} = {curve.name}"
                found[place] = Curve(name, other.colour, other.x, other.y, other.filled)
                break
        else:
            found.append(curve)
    return found


def histogram(values: Tensor, edges: Tensor) -> list[float]:
    """Share of the values (n,) in each bin; the last one has its upper edge."""
    places = torch.bucketize(values, edges, right=True).clamp(1, len(edges) - 1) - 1
    counts = torch.bincount(places, minlength=len(edges) - 1)
    return (counts.double() / len(values)).tolist()


def _alike(one: list[float], other: list[float]) -> bool:
    """Whether numbers are the same up to what no picture shows."""
    if len(one) != len(other):
        return False
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(b)) for a, b in zip(one, other, strict=True))
