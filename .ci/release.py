"""Builds a release into dist/ and tries it: `python .ci/release.py URL`, docs/releasing.md.

The README in what is built has absolute links, as package indexes show no relative ones. Wheel and
source distribution are each installed into an environment of their own and imported there.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
TRY = "import kfac_laplace, torch; print(kfac_laplace.__version__, kfac_laplace.__file__)"


def absolute(readme, url, revision):
    """A page with its relative links at a revision of the repository; pictures as raw files.

    Args:
        readme: the text.
        url: address of the repository, on a host that has raw/ and blob/ as GitHub does.
        revision: a tag or branch.
    """
    url = url.rstrip("/")

    def turned(match):
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({url}/{kind}/{revision}/{match[3]})"

    return LINK.sub(turned, readme)


def version():
    """The package's, without importing it."""
    text = (ROOT / "kfac_laplace" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def build(url, into):
    """The wheel and the source distribution of what git tracks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in listed.stdout.decode().split("\0")[:-1]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        readme = (tree / "README.md").read_text(encoding="utf-8")
        readme = absolute(readme, url, f"v{version()}")
        (tree / "README.md").write_text(readme, encoding="utf-8")
        command = [sys.executable, "-m", "build", "--outdir", str(into), str(tree)]
        subprocess.run(command, check=True)
    return sorted(into.glob(f"kfac_laplace-{version()}*"))


def installs(file, constraints):
    """Install a distribution into a new environment, and import it outside the repository."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, str(file)]
        subprocess.run(pip, check=True)
        found = subprocess.run(
            [python, "-c", TRY], cwd=folder, check=True, capture_output=True, text=True
        )
        print(file.name, found.stdout.strip())


def main():
    """Build, check, try."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("url", help="address of the repository")
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    chosen = parser.parse_args()
    files = build(chosen.url, chosen.outdir)
    subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True
    )
    for file in files:
        installs(file, str(ROOT / "constraints.txt"))


if __name__ == "__main__":
    main()
