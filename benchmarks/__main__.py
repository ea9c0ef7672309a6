"""Ours and the peers side by side: `python -m benchmarks`; docs/performance.md says how to read it.

    python -m benchmarks --suite fit --models mlp,wrn --sizes small
    python -m benchmarks tables

Each suite prints a table and writes SUITE.json and SUITE.png; "tables" writes those of
docs/performance.md from the JSON files. Needs the extra [demo], and the peers that are to be
measured: [laplace] brings all of them, [zoo] torchvision.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import pictures, report
from benchmarks.cases import CONTENDERS, SIZES, SUITES, Case, cases, installed, takes_part
from benchmarks.models import NETWORKS
from benchmarks.rounds import ROOT, Conditions, Row, run_case


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites and return 0; argparse ends with 2 on bad arguments."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.command == "tables":
        written = report.write_page(options.out)
        console.print(f"{report.PAGE.name}: {', '.join(written) or 'no results found'}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device 'cuda' cannot be used here")
    options.out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in options.peers if not installed(name)]
    if missing:
        console.print(f"not installed, left out: {', '.join(missing)}")
    contenders = [name for name in options.peers if name not in missing]
    for suite in options.suite or SUITES:
        found = run_suite(suite, contenders, options, console)
        if found:
            console.print(report.rich_table(suite, found))
    return 0


def run_suite(
    suite: str, contenders: Sequence[str], options: argparse.Namespace, console: Console
) -> list[Row]:
    """The rows of a suite, written after each case so that an interrupted run leaves them."""
    conditions = Conditions(
        device=options.device,
        threads=options.threads,
        repeats=options.repeats or (3 if options.sizes == "full" else 1),
        timeout=options.timeout,
        memory_gib=options.memory,
        seconds=options.seconds or {"tiny": 0.2, "small": 2.0, "full": 10.0}[options.sizes],
    )
    path = options.out / f"{suite}.json"
    before = report.read_rows(path, conditions) if options.keep and path.exists() else []
    rows: list[Row] = []
    every = cases(suite, options.sizes)
    for case in cases(suite, options.sizes, options.models):
        if options.classes and case.classes not in options.classes:
            continue
        if mine := partakers(case, contenders):
            rows += run_case(case, mine, conditions, lambda text: progress(console, text))
            together = report.joined(before, rows, [case.title for case in every])
            report.write_json(path, together, options.sizes, conditions)
            pictures.draw(suite, together, options.out / f"{suite}.png")
    return rows


def partakers(case: Case, contenders: Sequence[str]) -> list[str]:
    """The contenders that offer what a case asks for."""
    return [name for name in contenders if takes_part(name, case)]


def progress(console: Console, text: str) -> None:
    """What is being measured now; in terminals alone."""
    if console.is_terminal:
        console.print(text, style="dim")


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "tables"), default="run")
    add("--suite", action="append", choices=SUITES, help="repeatable (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--peers", type=names(CONTENDERS), default=tuple(CONTENDERS), metavar="NAMES",
        help=f"contenders, of: {','.join(CONTENDERS)} (default: all)")  # fmt: skip
    add("--models", type=names(NETWORKS), default=(), metavar="NAMES",
        help=f"networks, of: {','.join(NETWORKS)} (default: the suite's)")  # fmt: skip
    add("--classes", type=at_least_one, action="append", metavar="C",
        help="cases with so many outputs alone; repeatable (default: all)")  # fmt: skip
    add("--sizes", choices=SIZES, default="small",
        help="tiny: does all run? small: ten minutes; full: hours (default: small)")  # fmt: skip
    add("--repeats", type=at_least_one, metavar="N",
        help="rounds over the contenders (default: 3 in full, else 1)")  # fmt: skip
    add("--threads", type=at_least_one, default=1, metavar="N", help="of torch (default: 1)")
    add("--timeout", type=float, default=600, metavar="S", help="a process (default: 600 s)")
    add("--memory", type=float, default=8, metavar="GIB", help="of a task (default: 8 GiB)")
    add("--seconds", type=float, metavar="S",
        help="for the later runs of a process (default: 10 in full, 2 in small)")  # fmt: skip
    add("--keep", action="store_true",
        help="keep the rows of an earlier run under the same conditions")  # fmt: skip
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR",
        help="folder of JSON and pictures (default: benchmarks/results)")  # fmt: skip
    return parser


class names:  # noqa: N801  # a converter, which argparse names in its message
    """Converts a list with commas of known names."""

    def __init__(self, known: Sequence[str] | dict[str, object]):
        self.known = tuple(known)

    def __call__(self, text: str) -> tuple[str, ...]:
        """The names."""
        found = tuple(text.split(","))
        for name in found:
            if name not in self.known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {','.join(self.known)}")
        return found


def at_least_one(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got '{text}'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
