"""The committed notebooks are their pages, and run."""

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / ".ci" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebooks_are_their_pages(tool):
    """After a change of a page: `make notebooks`."""
    names = {tool.path_of(page).name for page in tool.PAGES}
    assert names == {path.name for path in tool.FOLDER.glob("*.ipynb")}
    for page in tool.PAGES:
        committed = nbformat.read(tool.path_of(page), as_version=4)
        nbformat.validate(committed)
        assert cells(committed) == cells(tool.notebook(page)), page
        run = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
        assert run == list(range(1, len(run) + 1)), f"{page} was not run from top to bottom"


def test_links_lead_to_files_beside_the_notebooks(tool):
    for page in tool.PAGES:
        for cell in tool.notebook(page).cells:
            if cell.cell_type == "markdown":
                for link in tool.LINK.findall(cell.source):
                    assert (tool.FOLDER / link.partition("#")[0]).exists(), link


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook's own process and its messages
@pytest.mark.parametrize("number", [0, 1, 2])
def test_notebooks_run(tool, number):
    """An exception in a cell is one here."""
    made = tool.run(tool.notebook(tool.PAGES[number]))
    assert all(cell.execution_count for cell in made.cells if cell.cell_type == "code")
