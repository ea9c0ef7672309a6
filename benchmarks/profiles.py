"""Where the time of each suite goes, and how far a curvature pass is from its operation count.

    python -m benchmarks.profiles [--networks wrn,vit] [--output FILE]

Times come from torch.profiler, with a label around each part of the work. The floor of a curvature
pass is the number of floating-point operations that it needs, at the rate at which a training step
of the same batch does its own, in training steps; operations in float64 count twice. One thread.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import SETTINGS, Case
from benchmarks.tasks import Setting, Task, make, rehearsal
from kfac_laplace import Curvature
from kfac_laplace.curvature import backend
from kfac_laplace.curvature.estimate import blocks as factors
from kfac_laplace.curvature.estimate import kronecker_accumulator as sums
from kfac_laplace.curvature.gradients import network
from kfac_laplace.curvature.linalg import gram as grams
from kfac_laplace.curvature.recording import backward
from kfac_laplace.posterior import gaussian
from kfac_laplace.posterior.predict import glm
from kfac_laplace.states.files import write_text

#: label → where the function is that does this part. Parts may lie inside others.
PARTS: dict[str, tuple[Any, str]] = {
    "curvature pass": (backend.Curvature, "accumulate"),
    "forward": (network.Network, "record"),
    "backward": (backward.Backward, "__call__"),
    "B": (sums.KroneckerAccumulator, "receive"),
    "A, expand": (sums.KroneckerAccumulator, "_rows"),
    "A, reduce": (sums.KroneckerAccumulator, "_means"),
    "eigenvalues": (grams, "eigenvalues"),
    "eigenvectors": (factors, "eigenbasis"),
    "table of logarithms": (gaussian.LogTable, "of"),
    "gradient rows": (glm.ForwardPass, "rows"),
    "covariances": (glm, "factored_covariance"),
}
#: Parts that others are inside of: their own time is what is left.
OUTER = {"backward": ("B",)}
ROUNDS = 5


def main() -> None:
    """Print a line for each case and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="mlp,wrn,vit")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = options.networks.split(",")
    rows = []
    for row in chain(fits(networks), others(networks)):
        print(row["case"], {k: round(v, 3) for k, v in row.items() if k != "case"}, flush=True)
        rows.append(row)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


def fits(networks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Curvature passes: parts and floor, in training steps."""
    for name in networks:
        for approx, fisher in SETTINGS:
            case = Case("fit", name, 32, 10, approx, fisher)
            setting = Setting("ours", case, "cpu")
            first = Curvature(
                setting.model, "classification", kfac_approx=approx, fisher=fisher
            ).accumulate(setting.x, setting.y)

            def run(first: Curvature = first, setting: Setting = setting) -> None:
                first.empty().accumulate(setting.x, setting.y)

            steps = in_steps(run, setting.step)
            found = parts(run)
            scale = steps / found["curvature pass"]  # a run under the profiler is slower
            found = {label: seconds * scale for label, seconds in found.items()}
            known = sum(found.get(k, 0) for k in ("forward", "backward", "B"))
            known += found.get("A, expand", 0) + found.get("A, reduce", 0)
            found["rest"] = found.pop("curvature pass") - known
            floor = operations(run) / operations(setting.step)
            yield {"case": case.title, "training steps": steps, "floor": floor, **found}


def others(networks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The other suites: seconds of their parts."""
    for name in networks:
        for case in (
            Case("evidence", name, 8, fisher="mc"),
            Case("predict", name, 8, fisher="mc"),
            Case("online", name, 32, 10, "reduce", "mc", batches=2),
        ):
            make("ours-laplace", rehearsal(case), "cpu").run()
            task: Task = make("ours-laplace", case, "cpu")
            start = perf_counter()
            found = parts(task.run)
            yield {
                "case": f"{case.suite}: {case.title}",
                "seconds": perf_counter() - start,
                **found,
            }


def parts(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by label."""
    with labelled(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    found = {
        event.key: event.cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.key in PARTS
    }
    for label, inner in OUTER.items():
        if label in found:
            found[label] -= sum(found.get(part, 0.0) for part in inner)
    return found


@contextmanager
def labelled() -> Iterator[None]:
    """Put a label around each part."""
    with ExitStack() as stack:
        for label, (owner, name) in PARTS.items():
            raw = vars(owner)[name]
            bound = isinstance(raw, classmethod)
            inner = raw.__func__ if bound else raw
            outer = with_label(label, inner)
            stack.enter_context(patch.object(owner, name, classmethod(outer) if bound else outer))
        yield


def with_label(label: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a label of the profiler."""

    def outer(*args: Any, **options: Any) -> Any:
        with record_function(label):
            return inner(*args, **options)

    return outer


def operations(run: Callable[[], Any]) -> float:
    """Floating-point operations, those in float64 twice; elementwise ones are left out."""
    more = 0.0
    rank_k = grams._add_rank_k

    def counted(total: torch.Tensor, rows: torch.Tensor) -> None:
        nonlocal more
        more += rows.numel() * (rows.shape[-1] + 1) * (rows.element_size() / 4)
        rank_k(total, rows)

    def of_addbmm(_: Any, one: Any, other: Any, *args: Any, **options: Any) -> int:
        return 2 * one[0] * one[1] * one[2] * other[2]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addbmm_: of_addbmm})
    with patch.object(grams, "_add_rank_k", counted), counter:
        run()
    return counter.get_total_flops() + more


def in_steps(run: Callable[[], Any], step: Callable[[], Any]) -> float:
    """Median of the time of a run as a multiple of that of the step beside it."""
    run(), step()
    ratios = []
    for _ in range(ROUNDS):
        start = perf_counter()
        run()
        between = perf_counter()
        step()
        ratios.append((between - start) / (perf_counter() - between))
    return median(ratios)


if __name__ == "__main__":
    main()
