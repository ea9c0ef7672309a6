"""Every example in the documentation runs; every link and every source key leads somewhere."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kfac_laplace.curvature.layers import registry

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*ROOT.glob("README.md"), *DOCS]
LINKED = [*PAGES, *ROOT.glob("C[OH]*.md")]  # CONTRIBUTING, CHANGELOG
SOURCES = sorted((ROOT / "kfac_laplace").rglob("*.py"))
REFERENCES = ROOT / "docs" / "references.md"

# Only an example that cannot run anywhere is marked "python skip".
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIPPED = re.compile(r"^```python skip\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
# Examples may use these; without them their page is skipped.
PACKAGES = (
    "transformers|peft|torch_geometric|laplace|sklearn|matplotlib|safetensors|botorch|lightning"
)
OPTIONAL = re.compile(rf"^(?:from|import) ({PACKAGES})\b", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# [KFAC23], [ML21, eq. 6], [MacKay 1992], [Hobbhahn et al. 2022, eq. 3]
KEY = re.compile(r"\[([A-Z][A-Za-z]*\d\d|[A-Z]\w+(?: et al\.)? \d{4})(?:, [^\]]*)?\]")
# | `Gram` | the field's word | `curvature/linalg/gram.py` |
WORD = re.compile(r"^\| `(\w+)` \| .* \| `([\w/.]+)` \|$", re.MULTILINE)
DEFINED = re.compile(r"^\* \*\*\[(.+?)\]\*\*", re.MULTILINE)


def name(path):
    return str(path.relative_to(ROOT))


def prose(page):
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What a heading is called in a link: lower case, spaces as hyphens, the rest dropped."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def docstrings(path):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds):
            yield ast.get_docstring(node) or ""


def cited(texts):
    return {key for text in texts for key in KEY.findall(text)}


def in_docstrings():
    return cited(text for path in SOURCES for text in docstrings(path))


def in_pages():
    return cited(prose(page) for page in PAGES if page != REFERENCES)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_example_escapes(page):
    """Indented, misspelt or unclosed, a block would be shown to readers and never run."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^[ \t>]*(?:```+|~~~+)[ \t]*py", text, re.MULTILINE | re.IGNORECASE)
    assert len(fences) == len(EXAMPLE.findall(text)) + len(SKIPPED.findall(text))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if EXAMPLE.search(page.read_text("utf-8"))], ids=name
)
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page, one after another in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": "example"}
    for package in OPTIONAL.findall(text):
        pytest.importorskip(package)
    for block in EXAMPLE.finditer(text):
        # Blank lines in front, so that a traceback names the line of the page.
        source = "\n" * (text[: block.start(1)].count("\n")) + block[1]
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.slow
def test_several_processes_run_the_page_about_them(tmp_path):
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (tmp_path / "script.py").write_text("\n".join(EXAMPLE.findall(text)), encoding="utf-8")
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *start, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "posterior.pt").exists()


def prompts(path):
    """Number of statements of the examples in a file's docstrings."""
    return sum(text.count(">>> ") for text in docstrings(path))


@pytest.fixture(autouse=True)
def process():
    """Leaves the process as it was: an example may set the default precision and show figures."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def rules():
    """Puts the tables of rules back, to which an example may add."""
    tables = [registry.RULES, registry.OPERATORS, registry.REPETITIONS, registry.GUARDS]
    tables.append(registry.FORMS)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.mark.parametrize("path", [path for path in SOURCES if prompts(path)], ids=name)
def test_examples_in_docstrings_run(path):
    """All that there are: those of what doctest does not find would only look as if they ran."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    result = doctest.testmod(module)
    assert result == doctest.TestResults(failed=0, attempted=prompts(path))


def test_examples_in_docstrings_are_prompts():
    """What stands in a fence would not run."""
    assert any(prompts(path) for path in SOURCES)
    assert not any("```" in text for path in SOURCES for text in docstrings(path))


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_relative_links_resolve(page):
    """To a file that exists and, behind a #, to one of its headings."""
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_page_has_a_title_and_something_below(page):
    title, _, rest = page.read_text().strip().partition("\n")
    assert title.startswith("# ") and rest.split()


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = set(LINK.findall(prose(index)))
    pages = {page.relative_to(index.parent) for page in DOCS if page != index}
    # Those of the reference are lists of names, which the site fills in.
    assert {str(page) for page in pages if page.parts[0] != "api"} <= linked


def test_words_stand_where_the_page_says():
    """In a file, or in some file of a folder, as a whole word."""
    rows = WORD.findall((ROOT / "docs" / "words.md").read_text(encoding="utf-8"))
    assert len(rows) > 40
    lost = []
    for word, where in rows:
        place = ROOT / "kfac_laplace" / where
        files = place.rglob("*.py") if place.is_dir() else [place] if place.exists() else []
        found = re.compile(rf"\b{re.escape(word)}\b")
        if not any(found.search(path.read_text(encoding="utf-8")) for path in files):
            lost.append(f"{word}: {where}")
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_source_keys_are_in_the_references():
    """Bracketed sources in docstrings and pages are spelled out in docs/references.md."""
    assert {"KFAC23", "ML21", "REDUX21", "MacKay 1992", "Hobbhahn et al. 2022"} <= in_docstrings()
    defined = set(DEFINED.findall(REFERENCES.read_text(encoding="utf-8")))
    assert in_docstrings() | in_pages() <= defined
    assert defined <= in_docstrings() | in_pages(), "listed, but nothing refers to it"
