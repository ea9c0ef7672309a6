"""Layering: rooms in the order in which data pass them, no circles, nothing private across files.

Imports for type checkers and inside functions count as all others do.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from imports import Import, Sources, circles, imported, room_of, uphill

ROOT = Path(__file__).parents[1]
HOUSE = Sources(ROOT / "kfac_laplace")

# Each may import from those before it. Who builds a room gives it its line.
ROOMS = """
version
errors
options
devices
process
states
likelihoods
curvature/__init__
curvature/model
curvature/linalg
curvature/rows
curvature/layers
curvature/recording
curvature/gradients
curvature/estimate
curvature/ranks
curvature/shards
curvature/options
curvature/spelling
curvature/ggn
curvature/accumulate
curvature/plain_groups
curvature/state_checks
curvature/block_state
curvature/state
curvature/live_state
curvature/batch_digest
curvature/same_fit
curvature/termination
curvature/checkpoint
curvature/agreement
curvature/distributed
curvature/backend
posterior/__init__
posterior/hyperparameters
posterior/layouts
posterior/patterns
posterior/sharing
posterior/squares
posterior/prior
posterior/carry
posterior/block
posterior/low_rank
posterior/held
posterior/log_table
posterior/log_dets
posterior/expansion
posterior/gaussian
posterior/passes
posterior/tiles
posterior/objectives
posterior/bounds
posterior/optimum
posterior/mackay
posterior/steps
posterior/claims
posterior/predict
posterior/calibrate
posterior/state
summary
planning
pretrained
report
migration
subnetworks
keywords
laplace
optim
marglik
__init__
integrations
plots
demo
cli
""".split()
EDGE = ["report/figure", "plots", "demo", "cli"]
INTEGRATIONS = ["integrations"]
PEERS = {
    "laplace", "asdl", "asdfghjkl", "curvlinops", "backpack", "laplax", "posteriors",
    "botorch", "gpytorch", "linear_operator",
}  # fmt: skip
PRESENTATION = {"matplotlib", "rich", "sklearn", "torchmetrics"}

# A file with more lines than this has its reason in docs/design.md, under the heading "Long files":
# | `kfac_laplace/laplace.py` | the facade, one verb after another |
LONG = 350
SECTION = re.compile(r"^#+ Long files$(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
LISTED = re.compile(r"^\| *`(\S+\.py)` *\| *\S.*\|$", re.MULTILINE)


def outside(rooms):
    return [file for file in HOUSE.files if room_of(file, rooms) is None]


def top_levels(file):
    return {one.module.split(".")[0] for one in HOUSE.imports(file)}


def long_files(root):
    folders = ("kfac_laplace", "tests", "benchmarks")
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return {
        path.relative_to(root).as_posix()
        for path in paths
        if len(path.read_text("utf-8").splitlines()) > LONG
    }


def with_reasons(page):
    """The files of the table "Long files" that have a reason beside them."""
    return {file for section in SECTION.findall(page) for file in LISTED.findall(section)}


def test_no_circles():
    found = circles(HOUSE.arrows())
    assert not found, "\n".join(" - ".join(circle) for circle in found)


def test_every_file_has_a_room_and_every_room_a_file():
    assert outside(ROOMS) == []
    assert set(ROOMS) == {room_of(file, ROOMS) for file in HOUSE.files}


def test_no_arrow_leads_uphill():
    found = uphill(HOUSE.arrows(), ROOMS)
    assert not found, "\n".join(f"{file} imports {target}" for file, target in found)


@pytest.mark.parametrize("file", HOUSE.files)
def test_nothing_private_crosses_files(file):
    assert HOUSE.private(file) == set()


def test_long_files_have_a_reason():
    assert long_files(ROOT) == with_reasons((ROOT / "docs" / "design.md").read_text("utf-8"))


@pytest.mark.parametrize("file", outside(INTEGRATIONS))
def test_no_peer_library_outside_integrations(file):
    assert top_levels(file).isdisjoint(PEERS)


@pytest.mark.parametrize("file", outside(EDGE + INTEGRATIONS))
def test_presentation_libraries_stay_at_the_edge(file):
    assert top_levels(file).isdisjoint(PRESENTATION)


@pytest.mark.parametrize("file", outside(INTEGRATIONS))
def test_nothing_imports_the_integrations(file):
    names = {f"{one.module}.{one.taken}." for one in HOUSE.imports(file)}
    assert not any(name.startswith("kfac_laplace.integrations.") for name in names)


# --- the checker, on houses in which something is wrong ----------------------------------------


@pytest.fixture
def build(tmp_path):
    def build(files: dict[str, str]) -> Sources:
        """A package `house` with these files."""
        for name, source in files.items():
            path = tmp_path / "house" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return Sources(tmp_path / "house")

    return build


def test_the_parser_sees_every_form_of_import():
    source = "import a.b as c\nfrom . import x\nfrom ..posterior import y as z\ndef f():\n import w"
    assert list(imported(source, "house.curvature")) == [
        Import("a.b", None, "c"),
        Import("house.curvature", "x", "x"),
        Import("house.posterior", "y", "z"),
        Import("w", None, "w"),
    ]


def test_arrows_lead_to_the_file_that_is_meant(build):
    """A module taken from its package says nothing about the package's own file."""
    house = build(
        {
            "__init__": "from house.up.b import thing",
            "up/__init__": "",
            "up/a": "from house.up import b\nfrom house.up.b import thing\nimport torch",
            "up/b": "from house import thing\nfrom .. import up",
        }
    )
    assert house.arrows() == {
        "__init__": {"up/b"},
        "up/__init__": set(),
        "up/a": {"up/b"},
        "up/b": {"__init__", "up/__init__"},
    }


@pytest.mark.parametrize(
    "back",
    [
        "from house.a import A",
        "from . import a",
        "import house.a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.a import A",
        "def f():\n    from house.a import A",
    ],
)
def test_circles_are_found_however_they_are_closed(build, back):
    files = {"__init__": "", "a": "import house.b", "b": "from house import c", "c": "x = 1"}
    assert circles(build(files).arrows()) == []
    assert circles(build(files | {"c": back, "d": "import house.a"}).arrows()) == [["a", "b", "c"]]


def test_circles_are_told_apart(build):
    files = {"a": "import house.b", "b": "import house.a\nimport house.c", "c": "import house.c"}
    assert circles(build(files).arrows()) == [["a", "b"], ["c"]]


def test_uphill_arrows_are_found(build):
    files = {
        "low/__init__": "",
        "low/ground": "",
        "low/first": "from house.low.ground import x\nfrom house.high import y",
        "high": "from house.low import first",
        "strange": "from house.high import y",
    }
    arrows = build(files).arrows()
    assert uphill(arrows, ["low", "high"]) == [("low/first", "high")]
    assert uphill(arrows, ["high", "low"]) == [("high", "low/first")]
    # a room within a room: the longest name counts
    assert uphill(arrows, ["high", "low/first", "low"]) == [
        ("high", "low/first"),
        ("low/first", "low/ground"),
    ]


def test_a_file_without_a_room_is_seen():
    assert room_of("posterior/gaussian", ["posterior", "posterior/gauss"]) == "posterior"
    assert room_of("posterior/gaussian", ["posterior/gauss"]) is None
    assert room_of("__init__", ["posterior"]) is None


def test_private_names_are_found(build):
    files = {
        "_hidden": "x = 1",
        "a": "_x = 1\n__version__ = ''\ny = 1",
        "b": "from house.a import _x, __version__, y\nfrom torch import _C",
        "c": "from house import a as first\nself._x = first._x + first.y._z + first.__doc__",
        "d": "import house.a\nhouse.a._x",
        "e": "def f():\n    from house._hidden import x",
        "f": "from house.a import y\ny._z",
    }
    house = build(files)
    assert {file: house.private(file) for file in "abcdef"} == {
        "a": set(),
        "b": {"house.a._x"},
        "c": {"house.a._x"},
        "d": {"house.a._x"},
        "e": {"house._hidden.x"},
        "f": set(),
    }


def test_long_files_are_found(tmp_path):
    for folder, name, lines in (("kfac_laplace", "long", 351), ("tests", "short", 350)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text("x = 1\n" * lines)
    assert long_files(tmp_path) == {"kfac_laplace/long.py"}


def test_only_a_reason_in_the_right_table_counts():
    page = "| `a.py` | why |\n## Long files\n\n| file | why |\n|---|---|\n| `b.py` | it must |\n"
    assert with_reasons(page + "| `c.py` | |\n\n## Then\n\n| `d.py` | why |\n") == {"b.py"}
    assert with_reasons(page) == {"b.py"}
    assert with_reasons("# No such heading\n\n| `a.py` | why |\n") == set()
