"""The lines of laplace-torch's documentation with `kfac_laplace` in place of `laplace`."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from peers.lines import decisions, front, pages, processes  # noqa: F401  # which fill the table
from peers.lines.table import ALIKE, LINES, OURS, by_them
from torch import Tensor

from kfac_laplace import KfacLaplaceError

ROOT = Path(__file__).parents[2]

RUNNING = [name for name, one in LINES.items() if one.outcome == "works"]


@pytest.mark.parametrize("name", LINES)
def test_it_works_or_says_what_to_write(name, caplog):
    one = LINES[name]
    if one.outcome == "works" or one.apart:
        one.run(OURS)
        return
    with pytest.raises(one.but or KfacLaplaceError) as caught:
        one.run(OURS)
    ours = isinstance(caught.value, KfacLaplaceError)
    said = str(caught.value) if ours else caplog.text
    assert ours != bool(one.but) and re.search(one.says, said, re.DOTALL)


@pytest.mark.parametrize("name", [name for name in RUNNING if LINES[name].same])
def test_it_gives_what_it_gives_there(name):
    """Kind and shape as written; the numbers with the defaults that laplace-torch has."""
    one = LINES[name]
    theirs = by_them(one)
    assert kinds(one.run(OURS)) == kinds(theirs)
    if one.same == "values":
        found = one.run(ALIKE)
        torch.testing.assert_close(found, theirs, check_dtype=False, rtol=one.rtol, atol=one.rtol)


@pytest.mark.parametrize("name", [name for name, one in LINES.items() if one.apart])
def test_it_gives_another_thing(name):
    assert kinds(LINES[name].run(OURS)) != kinds(by_them(LINES[name]))


@pytest.mark.parametrize(
    ("name", "error"), [("object_loaded", pickle.UnpicklingError), ("of_positions", ValueError)]
)
def test_it_does_not_run_there_either(name, error):
    """torch.load wants to be told of objects; linearised outputs with positions fail in 0.3."""
    with pytest.raises(error):
        by_them(LINES[name])


def kinds(found):
    """Shapes of tensors, and the types of anything else."""
    if isinstance(found, Tensor):
        return tuple(found.shape)
    return [kinds(each) for each in found] if isinstance(found, tuple) else type(found)


def counted():
    """Lines by page: all, those that work, those that say what to write, and neither."""
    by_page = {}
    for one in LINES.values():
        by_page.setdefault(one.page, Counter())[one.outcome] += 1
    rows = {
        page: (found.total(), found["works"], found["says"], found["neither"])
        for page, found in by_page.items()
    }
    return rows, tuple(sum(column) for column in zip(*rows.values(), strict=True))


def test_the_page_has_the_counts():
    """docs/coming-from-laplace-torch.md says of each page, and of all, what is true."""
    text = (ROOT / "docs" / "coming-from-laplace-torch.md").read_text("utf-8")
    rows, total = counted()
    table = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert {page: tuple(map(int, numbers)) for page, *numbers in table} == rows | {"all": total}
    words = "of {} lines of its documentation {} work as they stand, {} end in an error .*, {} in "
    assert re.search(words.format(*total), text.replace("\n", " "))
    same = sum(one.outcome == "works" and one.same == "values" for one in LINES.values())
    assert f"Of those that work {same} give the same numbers" in text
