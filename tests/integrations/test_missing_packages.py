"""Without its package, or with a broken one, an integration says which extra of ours brings it."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# integration, what it is made of and cannot import here, the extra
INTEGRATIONS = [
    ("sklearn", ["sklearn", "sklearn.base"], "sklearn"),
    ("botorch", ["botorch", "botorch.models.model"], "botorch"),
    ("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"], "lightning"),
    ("transformers", ["transformers"], "transformers"),
    ("laplace_torch", ["laplace", "laplace.curvature"], "laplace"),
]
MISSING = """
import sys
sys.modules.update(dict.fromkeys({hidden}))  # as if they were not installed
"""
#: As torchvision beside a torch of another build.
BROKEN = """
import sys
class Broken:
    def find_spec(name, path=None, target=None):
        if name in {hidden}:
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken)
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", [MISSING, BROKEN], ids=["missing", "broken"])
@pytest.mark.parametrize(("name", "hidden", "extra"), INTEGRATIONS, ids=lambda value: str(value))
def test_the_error_names_the_extra(name, hidden, extra, state):
    code = f"""
{state.format(hidden=hidden)}
from kfac_laplace.errors import MissingPackage
try:
    import kfac_laplace.integrations.{name}
except MissingPackage as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert f'pip install "kfac-laplace[{extra}]"' in done.stdout
    assert state is MISSING or "torchvision::nms" in done.stdout
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", "utf-8")
    assert extra in setup["options.extras_require"]
