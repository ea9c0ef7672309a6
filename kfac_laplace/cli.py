"""The command line: `kfac-laplace demo`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kfac_laplace import KfacLaplaceError, __version__

EXTRA = 'the demo needs packages that are not installed: pip install "kfac-laplace[demo]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 on success, 2 with one line on bad arguments, 130 when interrupted.
    """
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return demo(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BadArgument as error:
        print(f"kfac-laplace demo: error: {error}", file=sys.stderr)
        return 2
    except KfacLaplaceError as error:
        print(f"kfac-laplace demo: {error}", file=sys.stderr)
        return 1


class BadArgument(Exception):
    """An argument that cannot be used; its text is the whole message."""


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers bad arguments with one line and exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn
        """Print the message alone."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = OneLineParser(prog="kfac-laplace", description=__doc__)
    parser.add_argument("--version", action="version", version=f"kfac-laplace {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    add = commands.add_parser(
        "demo",
        help="train with and without tuning, compare, and draw",
        description="Train a CNN and a micro-ViT on scikit-learn's digits, and an MLP on its "
        "diabetes data, with and without tuning by the marginal likelihood. Prints tables and "
        "writes pictures and results.json.",
    ).add_argument
    add("--quick", action="store_true", help="less of everything, in a few minutes")
    add("--seeds", type=positive, default=1, metavar="N", help="number of seeds (default: 1)")
    add("--seed", type=seed, default=0, help="the first seed (default: 0)")
    add("--models", type=models, metavar="NAMES", help="networks, of: cnn,vit (default: both)")
    add("--device", default="cpu", help="where to train, cpu or cuda (default: cpu)")
    add(
        "--output", type=Path, default=Path("demo-results"), metavar="DIR",
        help="folder for pictures and results.json (default: demo-results)",
    )  # fmt: skip
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got '{text}'")
    return int(text)


def seed(text: str) -> int:
    """A whole number of at least 0 that fits in 32 bits."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"a whole number from 0 to 4294967295 is needed, got '{text}'"
        )
    return int(text)


def models(text: str) -> tuple[str, ...]:
    """Names of the demo's networks, each once."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in ("cnn", "vit")]
    if unknown:
        raise argparse.ArgumentTypeError(f"no network is called '{unknown[0]}'; there are cnn, vit")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"each network can be named once, got '{text}'")
    return names


def demo(options: argparse.Namespace) -> int:
    """Check the arguments that argparse cannot, then run the demo."""
    device = usable_device(options.device)
    output = writable_folder(options.output)
    try:
        from rich.console import Console

        from kfac_laplace.demo.experiment import run
        from kfac_laplace.demo.settings import PRESETS
    except ModuleNotFoundError as error:
        raise BadArgument(f"{EXTRA} (missing: {error.name})") from error
    settings = replace(
        PRESETS["quick" if options.quick else "default"],
        seeds=options.seeds, seed=options.seed, device=device,
    )  # fmt: skip
    if options.models:
        settings = replace(settings, models=options.models)
    run(settings, output, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def usable_device(name: str) -> str:
    """The device's name, if this machine has it."""
    try:
        torch.zeros(1, device=torch.device(name)).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadArgument(f"device '{name}' cannot be used here: {reason}") from error
    return name


def writable_folder(path: Path) -> Path:
    """The folder, made if it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadArgument(f"cannot write to '{path}': {error.strerror}") from error
    return path


if __name__ == "__main__":
    sys.exit(main())
