"""Lets a torchvision built for another torch be imported, without its compiled operators.

Run as a script, it looks whether this Python imports torchvision and, only where it does not,
copies itself into site-packages with a `.pth` file that imports the copy whenever Python starts.

torchvision describes two of its operators, `nms` and `qnms`, to torch while it is imported. Where
its compiled extension could not be loaded, for example a CUDA build beside a CPU build of torch,
they do not exist, and the import ends in "operator torchvision::nms does not exist". Among its
models only detectors call them. Declared without an implementation they satisfy the import, and
calling them stays an error.
"""

import sys

# What torchvision.ops calls them with.
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators:
    """Meta-path finder that finds nothing: the import system asks it, and it takes the occasion.

    It costs other programs one comparison for each import, and no import of torch.
    """

    library = None  # torch forgets the declarations when this object goes

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Declares the operators before the module that describes them, where they are missing."""
        if name == "torchvision._meta_registrations" and cls.library is None:
            extension = sys.modules["torchvision.extension"]
            if not extension._has_ops():
                import torch

                cls.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    if not hasattr(torch.ops.torchvision, operator):  # the program may have done it
                        cls.library.define(operator + SIGNATURE)


def install():
    """Makes `import torchvision` work in this environment, or exits with the reason."""
    import importlib.util
    import pathlib
    import py_compile
    import shutil
    import subprocess
    import sysconfig

    module = pathlib.Path(__file__)
    site_packages = pathlib.Path(sysconfig.get_path("purelib"))
    copy, start = (site_packages / (module.stem + suffix) for suffix in (".py", ".pth"))
    bytecode = pathlib.Path(importlib.util.cache_from_source(str(copy)))

    def remove():
        for file in (start, copy, bytecode):
            file.unlink(missing_ok=True)

    remove()
    attempt = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(attempt, stderr=subprocess.DEVNULL).returncode:
        shutil.copyfile(module, copy)
        py_compile.compile(str(copy), bytecode)  # also where Python is told to write no bytecode
        start.write_text(f"import {module.stem}\n")
        if subprocess.run(attempt).returncode:
            remove()
            sys.exit("torchvision cannot be imported, see above: install the build for your torch")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, DeclareOperators)
