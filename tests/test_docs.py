"""Every example in the documentation runs; every link and every source key leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
KEY = re.compile(r"\[([A-Z][A-Za-z]*\d\d)\b[^\]]*\]|\[((?:[A-Z]\w+)(?: et al\.)? \d{4})\]")


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, name(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name
)
def test_relative_links_resolve(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_source_keys_are_in_the_references():
    """Bracketed sources in docstrings and pages are spelled out in docs/references.md."""
    references = (ROOT / "docs" / "references.md").read_text()
    texts = [p.read_text() for p in (ROOT / "kfac_laplace").rglob("*.py")]
    texts += [p.read_text() for p in PAGES if p.name != "references.md"]
    keys = {a or b for text in texts for a, b in KEY.findall(text)}
    assert {"KFAC23", "ML21", "REDUX21"} <= keys
    assert all(f"**[{key}]**" in references for key in keys), keys
