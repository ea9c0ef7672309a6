"""Layering: data walks curvature -> posterior -> marglik, and nothing walks back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kfac_laplace"
FILES = sorted(PACKAGE.rglob("*.py"))
INTEGRATIONS = {"integrations"}
EDGE = {"plots", "cli", "demo"}
PEERS = {"laplace", "asdl", "asdfghjkl", "curvlinops", "backpack", "laplax", "posteriors"}
PRESENTATION = {"matplotlib", "rich", "sklearn", "torchmetrics"}
FORBIDDEN_ROOMS = {
    "curvature": {"posterior", "marglik", "demo", "cli", "plots", "integrations"},
    "posterior": {"marglik", "demo", "cli", "plots", "integrations"},
    "marglik": {"demo", "cli", "plots", "integrations"},
    "errors": {"curvature", "posterior", "marglik", "demo", "cli", "plots", "integrations"},
    "likelihoods": {"curvature", "posterior", "marglik", "demo", "cli", "plots", "integrations"},
    "__init__": {"demo", "cli", "plots", "integrations"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of every module that the file imports, at any depth, relative ones resolved."""
    package = ["kfac_laplace", *path.relative_to(PACKAGE).parts[:-1]]
    return imported_from_source(path.read_text(), package)


def imported_from_source(source: str, package: list[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def room(path: Path) -> str:
    """First part of the path below the package: a folder or a module."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def identity(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def outside(rooms: set[str]) -> list[Path]:
    return [path for path in FILES if room(path) not in rooms]


def test_the_parser_sees_every_form_of_import():
    source = "import a.b as c\nfrom . import x\nfrom ..posterior import y\ndef f():\n import z"
    assert imported_from_source(source, ["kfac_laplace", "curvature"]) == {
        "a.b",
        "kfac_laplace.curvature",
        "kfac_laplace.curvature.x",
        "kfac_laplace.posterior",
        "kfac_laplace.posterior.y",
        "z",
    }


def test_the_rooms_exist():
    assert {"curvature", "posterior", "marglik", "errors", "likelihoods"} <= {
        room(path) for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_nothing_walks_back(path):
    forbidden = {f"kfac_laplace.{name}" for name in FORBIDDEN_ROOMS.get(room(path), ())}
    rooms = {".".join(name.split(".")[:2]) for name in imported(path)}
    assert rooms.isdisjoint(forbidden)


@pytest.mark.parametrize("path", outside(INTEGRATIONS), ids=identity)
def test_no_peer_library_outside_integrations(path):
    assert {name.split(".")[0] for name in imported(path)}.isdisjoint(PEERS)


@pytest.mark.parametrize("path", outside(EDGE), ids=identity)
def test_presentation_libraries_stay_at_the_edge(path):
    assert {name.split(".")[0] for name in imported(path)}.isdisjoint(PRESENTATION)


@pytest.mark.parametrize("path", outside(INTEGRATIONS), ids=identity)
def test_nothing_imports_the_integrations(path):
    rooms = {".".join(name.split(".")[:2]) for name in imported(path)}
    assert "kfac_laplace.integrations" not in rooms
