"""The site builds without a warning, and its reference has every public name."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kfac_laplace
from kfac_laplace import optim

ROOT = Path(__file__).parents[1]
LISTED = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))


def listed():
    return {name for page in PAGES for name in LISTED.findall(page.read_text("utf-8"))}


def test_the_reference_has_every_public_name():
    names = {name for name in vars(kfac_laplace) if not name.startswith("_")}
    modules = {name for name in names if isinstance(getattr(kfac_laplace, name), type(sys))}
    wanted = {name for name in names - modules if name != "KfacLaplaceError"}
    assert {f"kfac_laplace.{name}" for name in wanted} <= listed()
    assert optim.__name__ in listed() and "kfac_laplace.errors" in listed()
    libraries = ("laplace_torch", "lightning", "transformers", "sklearn", "botorch")
    assert {f"kfac_laplace.integrations.{name}" for name in libraries} <= listed()


def test_what_the_reference_lists_exists():
    for name in listed():
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Such as of links that lead nowhere, pages without an entry, docstrings that do not parse."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {
        str(path.relative_to(tmp_path / "site").parent) for path in tmp_path.rglob("index.html")
    }
    assert {
        ".",
        "tutorial",
        "recipes/pruning",
        "api/posterior",
        "contributing",
        "changelog",
    } <= pages
    html = (tmp_path / "site" / "api" / "posterior" / "index.html").read_text("utf-8")
    assert 'id="kfac_laplace.Laplace.fit"' in html and "held-out data" in html
    for path in tmp_path.rglob("*.html"):  # nothing is asked of other hosts
        loaded = re.findall(
            r'(?:<script[^>]+src|<img[^>]+src|<link[^>]+rel="stylesheet"[^>]+href)="(http[^"]+)"',
            path.read_text("utf-8"),
        )
        assert not loaded, (path, loaded)
