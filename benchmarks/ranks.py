"""A fit on one process and on several: wall time, bytes that were sent, and what they find.

    python -m benchmarks.ranks [--networks wrn,vit] [--ranks 2] [--examples 256] [--output FILE]

Each process has one thread, so that k of them need k cores. Fits of one process and of all take
turns; what is told is the median of the ratios of a turn.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed import distributed_c10d

from benchmarks.models import Size, build, draw
from kfac_laplace import Curvature

Row = dict[str, Any]
BATCH = 32
CLASSES = 10


def packed_bytes(curvature: Curvature) -> int:
    """What the factors take, symmetric ones as triangles."""
    return sum(
        tensor.numel() * tensor.element_size()
        for block in curvature.blocks.values()
        for tensor in block.sums().values()
    )


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this process hands to torch.distributed: sums of curvature, and all else."""
    sent = {"sums": 0, "objects": 0}
    reduce, gather = dist.all_reduce, distributed_c10d.all_gather

    def counting_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["sums"] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **kwargs)

    def counting_gather(tensors: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["objects"] += tensor.numel() * tensor.element_size()
        return gather(tensors, tensor, *args, **kwargs)

    dist.all_reduce, distributed_c10d.all_gather = counting_reduce, counting_gather
    try:
        yield sent
    finally:
        dist.all_reduce, distributed_c10d.all_gather = reduce, gather


def fit(network: str, batches: list[tuple[Tensor, Tensor]], alone: bool) -> tuple[float, Curvature]:
    """Seconds of a fit of this process's batches, or of all that others have too."""
    torch.manual_seed(0)
    model = build(network, CLASSES, Size()).eval()
    curvature = Curvature(model, "classification", process_group=None if alone else "world")
    start = time.perf_counter()
    curvature.fit(batches)
    return time.perf_counter() - start, curvature


def on_rank(rank: int, ranks: int, network: str, examples: int, turns: int, folder: Path) -> None:
    """Turns of one process and of all; the first rank writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks
    )
    torch.manual_seed(1)
    x, y = draw(network, examples, CLASSES, Size())
    every = [*zip(x.split(BATCH), y.split(BATCH), strict=True)]
    own = every[rank * len(every) // ranks : (rank + 1) * len(every) // ranks]
    seconds: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        dist.barrier()
        one = fit(network, every, alone=True) if rank == 0 else None
        dist.barrier()  # the others wait without work
        with counted() as sent:
            together, curvature = fit(network, own, alone=False)
        told: list[Any] = [None] * ranks
        dist.all_gather_object(told, together)
        if one is not None and turn:  # the first is slower
            seconds.append((one[0], max(told)))
    if one is not None:
        packed, blocks = packed_bytes(curvature), curvature.blocks
        row = {
            "network": network,
            "examples": examples,
            "ranks": ranks,
            "seconds": [list(pair) for pair in seconds],
            "ratio": median(several / alone for alone, several in seconds),
            "packed_bytes": packed,
            "sent_bytes": sent,
            "sent_over_packed": sum(sent.values()) / packed,
            "difference": max(
                float((mine - theirs).norm() / theirs.norm())
                for name, block in one[1].blocks.items()
                for mine, theirs in zip(blocks[name].factors, block.factors, strict=True)
            ),
        }
        (folder / "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def measured(network: str, ranks: int, examples: int, turns: int) -> Row:
    """A row of the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.start_processes(
            on_rank, (ranks, network, examples, turns, folder), ranks, start_method="spawn"
        )
        return dict(json.loads((folder / "row.json").read_text()))


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="wrn,vit", help="of benchmarks.models")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--examples", type=int, default=256, help="in all")
    parser.add_argument("--turns", type=int, default=3, help="after the first")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    given = parser.parse_args()
    rows = []
    for network in given.networks.split(","):
        row = measured(network, given.ranks, given.examples, given.turns)
        rows.append(row)
        print(
            f"{network}: {given.ranks} processes take {row['ratio']:.2f} of one's time, send "
            f"{row['sent_over_packed']:.3f} of the packed factors "
            f"({row['packed_bytes'] / 2**20:.0f} MiB), and differ by {row['difference']:.1e}"
        )
    if given.output is not None:
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
