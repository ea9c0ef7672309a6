"""What is built and checked: the source distribution, the workflow, the hooks."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import kfac_laplace

ROOT = Path(__file__).parents[1]


def tracked():
    """Files under version control; a tree without it, an unpacked distribution, skips the test."""
    command = ["git", "ls-files", "-z"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    files = [name for name in found.stdout.split("\0") if name and (ROOT / name).exists()]
    if "setup.cfg" not in files:
        pytest.skip("a checkout of something else")
    return files


@pytest.mark.slow
def test_the_source_distribution_holds_what_is_tracked(tmp_path):
    """Tests, pages, benchmarks and the pinned set: what is unpacked can check itself."""
    pytest.importorskip("setuptools", minversion="64")
    tree, dist = tmp_path / "tree", tmp_path / "dist"
    files = tracked()
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    build = f"from setuptools import build_meta as b; b.build_sdist({str(dist)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, check=True)
    (archive,) = dist.iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert set(files) <= names
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|^\.git/|^\.venv", name)]


def test_the_workflow_runs_the_one_check():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    check = workflow["jobs"]["check"]
    assert [step["run"] for step in check["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    promised = re.findall(r":: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    assert set(check["strategy"]["matrix"]["python"]) <= set(promised)
    assert promised[0] in check["strategy"]["matrix"]["python"]  # the oldest


def test_the_hooks_are_local_and_their_tools_are_installed_by_make():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    tools = {hook["entry"].split()[0] for hook in config["repos"][0]["hooks"]}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    extra = setup["options.extras_require"]["test"].split()
    assert {tool.removeprefix(".venv/bin/") for tool in tools} <= {*extra, "git", "bash"}


@pytest.fixture(scope="module")
def release():
    path = ROOT / ".ci" / "release.py"
    spec = importlib.util.spec_from_file_location("release", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_of_a_release_has_absolute_links(release):
    """Package indexes show no relative ones."""
    made = release.absolute(
        "![a picture](docs/a.png) [a page](docs/b.md#c) [here](#d) [there](https://example.org/e)",
        "https://example.org/house/",
        "v1.0",
    )
    assert made == (
        "![a picture](https://example.org/house/raw/v1.0/docs/a.png) "
        "[a page](https://example.org/house/blob/v1.0/docs/b.md#c) "
        "[here](#d) [there](https://example.org/e)"
    )
    readme = release.absolute((ROOT / "README.md").read_text("utf-8"), "https://a.b", "v1")
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert links and all(re.match(r"https?:|#", link) for link in links)


def test_citation_release_and_package_have_one_version(release):
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == release.version() == kfac_laplace.__version__


@pytest.mark.slow
def test_an_import_loads_nothing_that_is_rarely_used():
    """Of scipy its top alone, and neither what draws nor what the integrations are for."""
    code = "import torch, sys; import kfac_laplace; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"scipy.linalg", "scipy.optimize", "scipy.special", "scipy.stats"}
    others = {"matplotlib", "sklearn", "torchmetrics", "laplace", "transformers", "lightning"}
    assert not loaded & (others | {"botorch", "gpytorch", "pandas", "safetensors", "rich"})
