"""Pages of the documentation as notebooks, with the outputs of a run: `make notebooks`.

A notebook is its page: text as it stands, each block of code a cell. tests/test_notebooks.py holds
the committed ones to their pages, and runs them.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "notebooks"
PAGES = ("tutorial.md", "recipes/out-of-distribution.md", "recipes/continual-learning.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
#: What only files need: a notebook shows its figures.
FOR_FILES = re.compile(r"^.*# files only.*\n", re.MULTILINE)


def path_of(page):
    """Where a page's notebook lies."""
    return FOLDER / Path(page).with_suffix(".ipynb").name


def notebook(page):
    """A page as a notebook without outputs."""
    text = (DOCS / page).read_text(encoding="utf-8")
    at = os.path.relpath((DOCS / page).parent, FOLDER)

    def from_here(link):
        return f"]({os.path.normpath(os.path.join(at, link[1]))})"

    cells, end = [], 0
    for block in [*BLOCK.finditer(text), None]:
        prose = text[end : block.start()] if block else text[end:]
        if prose.strip():
            prose = LINK.sub(from_here, prose.strip())
            cells.append(nbformat.v4.new_markdown_cell(prose))
        if block:
            code = FOR_FILES.sub("", block[1]).strip()
            cells.append(nbformat.v4.new_code_cell(code))
            end = block.end()
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same whenever it is made
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(made):
    """Run a notebook in an empty folder; its outputs are put into it."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times, which differ from run to run
    made.metadata.pop("language_info", None)
    return made


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for page in sys.argv[1:] or PAGES:
        nbformat.write(run(notebook(page)), path_of(page))
        print(path_of(page).relative_to(DOCS.parent))
