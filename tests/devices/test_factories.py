"""Tensors that the library makes say where: a user's default device may be another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "kfac_laplace"
FILES = sorted(path for path in ROOT.rglob("*.py") if "demo" not in path.parts)
FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


def without_device(source: str) -> list[int]:
    """Lines of calls of `torch` that make a tensor where the default device is.

    One that is moved at once, by `.to`, may; not if it draws from a generator, which has a device.
    """
    tree = ast.parse(source)
    moved = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "to"}
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        keywords = {keyword.arg for keyword in call.keywords}
        if name.removeprefix("torch.") in FACTORIES and name.startswith("torch."):
            if "device" not in keywords and (id(call) not in moved or "generator" in keywords):
                found.append(call.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tensors_name_their_device(path):
    assert without_device(path.read_text("utf-8")) == []


def test_calls_are_found():
    source = """
a = torch.zeros(3)
b = torch.ones(3, device=a.device)
c = torch.eye(3).to(a)
d = torch.rand(3, generator=g).to(a)
e = a.new_zeros(3)
"""
    assert without_device(source) == [2, 5]
