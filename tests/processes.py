"""Functions run on several processes of `torch.distributed`, and what they return by rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds after which a process that waits for another gives up.
PATIENCE = 600


def on_ranks(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function of the arguments returns on each rank, by gloo.

    Args:
        size: number of processes.
        folder: for what they leave to each other, empty.
        function: of a module that can be imported; it is called without the rank.
        args: what pickle takes.
    """
    context = _started(size, folder, function, args)
    end = time.monotonic() + PATIENCE
    while not context.join(timeout=1):  # it raises what one of them raised, and ends the others
        assert time.monotonic() < end, "processes wait for each other"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def survivors(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """What a function returns on the ranks that outlive it; arguments as for `on_ranks`."""
    context = _started(size, folder, function, args)
    for process in context.processes:
        process.join(PATIENCE)
        assert process.exitcode is not None, "processes wait for each other"
    ended = {rank for rank in range(size) if context.processes[rank].exitcode == 0}
    return {rank: torch.load(folder / f"{rank}.pt", weights_only=False) for rank in ended}


def _started(size: int, folder: Path, function: Callable[..., Any], args: Any) -> Any:
    """Processes that run."""
    return mp.start_processes(
        _run, (size, folder, function, args), size, join=False, start_method="spawn"
    )


def _run(rank: int, size: int, folder: Path, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()
