"""Run what is missing of an experiment, or write tables of what is there.

    python -m benchmarks.experiments images --seeds 5 --sizes 100,300,1000
    python -m benchmarks.experiments images --only method=plain,tuned network=cnn
    python -m benchmarks.experiments optimizers --tasks graphs,mnist-vit --only phase=search
    python -m benchmarks.experiments tables

Each finished cell is a line of OUT/NAME.jsonl; a run that was killed goes on where it was. Needs
the extra [demo]. MNIST, UCI and CIFAR-10 are read from the folder of --data, or of the environment
variable KFAC_LAPLACE_DATA; benchmarks/experiments/data.py says which files. Peers among the
optimisers run where `asdfghjkl` (the extra [laplace]) and `pytorch-optimizer` are installed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experiments.cost import COST
from benchmarks.experiments.experiment import Experiment, Place, chosen, run_all
from benchmarks.experiments.images import IMAGES
from benchmarks.experiments.lines import Lines
from benchmarks.experiments.optimizers.study import OPTIMIZERS
from benchmarks.experiments.rotation import ROTATION
from benchmarks.experiments.selection import SELECTION
from benchmarks.experiments.uci import UCI
from benchmarks.experiments.wrn import WRN
from kfac_laplace.states.files import write_text

OUT = Path(__file__).parents[1] / "results" / "experiments"
ALL = (IMAGES, UCI, WRN, SELECTION, ROTATION, COST, OPTIMIZERS)
EXPERIMENTS = {experiment.name: experiment for experiment in ALL}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where cells failed; argparse ends with 2 on bad arguments."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command == "tables":
        return write_tables(options.out)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"device '{options.device}' cannot be used here")
    if options.threads:
        torch.set_num_threads(options.threads)
    experiment = EXPERIMENTS[options.command]
    try:
        only = dict(only_of(text) for text in options.only)
        lines = Lines(options.out / f"{experiment.name}.jsonl")
        place = Place(options.device, options.data)
        failed = run_all(experiment, lambda: chosen(experiment.cells(options), only), lines, place)
    except ValueError as error:
        parser.error(str(error))
    for cell in failed:
        print(f"failed: {dict(cell)}", file=sys.stderr)
    return 1 if failed else 0


def write_tables(out: Path) -> int:
    """Print the report of each experiment that has lines, and write it beside them."""
    for name, experiment in EXPERIMENTS.items():
        if lines := Lines(out / f"{name}.jsonl").read():
            text = experiment.report(lines, out)
            write_text(text, out / f"{name}.md")
            print(text)
    return 0


def only_of(text: str) -> tuple[str, list[str]]:
    """The name and the values of NAME=VALUE,VALUE."""
    name, equals, values = text.partition("=")
    if not equals:
        raise ValueError(f"--only {text}: not of the form NAME=VALUE,VALUE")
    return name, values.split(",")


def build_parser() -> argparse.ArgumentParser:
    """A sub-command for each experiment, and "tables"."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="EXPERIMENT")
    for name, experiment in EXPERIMENTS.items():
        own = commands.add_parser(name, help=experiment.about, description=experiment.about)
        add_common(own, experiment)
    tables = commands.add_parser("tables", help="write tables and figures of finished cells")
    add_out(tables)
    return parser


def add_common(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    """Options of every experiment, and its own."""
    folder = os.environ.get("KFAC_LAPLACE_DATA")
    experiment.options(parser)
    add = parser.add_argument
    add("--only", nargs="*", default=[], metavar="NAME=VALUE,VALUE",
        help="cells with these entries alone, as in method=plain,tuned")  # fmt: skip
    add("--device", default="cpu", help="where to train (default: cpu)")
    add("--threads", type=int, default=0, help="threads of torch (default: its own choice)")
    add("--data", type=Path, default=Path(folder) if folder else None, metavar="DIR",
        help="folder of the data (default: KFAC_LAPLACE_DATA)")  # fmt: skip
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    """The folder of results."""
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of results (default: benchmarks/results/experiments)",
    )


if __name__ == "__main__":
    sys.exit(main())
