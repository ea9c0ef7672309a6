"""Forks processes that do a run, kills them at random moments, and has others go on.

    python tests/interruption/forge.py NAME KILLS SEED FOLDER

Forked from one that has imported everything, a life costs next to nothing before its work begins.
Prints one JSON object: how many were killed, how often a file of a dead process was looked at, and
what was wrong. The parent itself computes nothing: its children inherit no threads.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from bits import assert_same_bits  # noqa: E402
from interruption.runs import RUNS  # noqa: E402

from benchmarks.experiments.lines import Lines  # noqa: E402
from kfac_laplace.states.files import read, write  # noqa: E402
from kfac_laplace.states.plain import CHECKSUM, check_seal  # noqa: E402


def child(name: str, folder: Path, life: int) -> int:
    """Begin a life; its process."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        write({"result": RUNS[name](folder, life)}, folder / "result")
        (folder / "modules").write_text("\n".join(sys.modules))
    except BaseException:
        (folder / "error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def ended(process: int, seconds: float | None = None) -> int | None:
    """The status of a process when it has ended, or None when it is still alive after a while."""
    if seconds is None:
        return os.waitpid(process, 0)[1]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status
        time.sleep(0.0005)
    return None


def looked_at(folder: Path) -> int:
    """Look at what a killed process has left: files are whole. How many there were."""
    names = sorted(path.name for path in folder.iterdir())
    # Of a write in the middle no more than one file is left, beside the whole one.
    assert {*names} <= {"state", ".state.tmp", "lines.jsonl"}, names
    if (folder / "state").exists():
        state = read(folder / "state")
        if CHECKSUM in state:
            check_seal(state, "state")
    if (folder / "lines.jsonl").exists():
        Lines(folder / "lines.jsonl").read()
    return len({*names} & {"state", "lines.jsonl"})


def main(name: str, kills: int, seed: int, folder: Path) -> dict[str, object]:
    """Runs that are killed again and again until they are done, until so many were killed."""
    rng = random.Random(f"{name} {seed}")
    for whole in (folder / "first", folder / "whole"):
        whole.mkdir()
        began = time.monotonic()
        assert ended(child(name, whole, 0)) == 0, (whole / "error").read_text()
        seconds = time.monotonic() - began
        # What was imported on the way would take each life longer than its work.
        for module in (whole / "modules").read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    wanted = read(folder / "whole" / "result")
    assert_same_bits(read(folder / "first" / "result"), wanted)
    killed = looked = trials = lives = 0
    while killed < kills:
        trials += 1
        place = folder / f"trial-{trials}"
        place.mkdir()
        for life in range(10_000):
            lives += 1
            process = child(name, place, life)
            status = ended(process, rng.uniform(0, 0.7 * seconds) if killed < kills else None)
            if status is None:
                os.kill(process, signal.SIGKILL)
                status = ended(process)
                assert status is not None
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) == signal.SIGKILL
                killed += 1
                # Killed while the result was written, which is no part of what is tested.
                for path in [*place.glob(".*.tmp"), place / "modules"]:
                    if path.name != ".state.tmp":
                        path.unlink(missing_ok=True)
                if not (place / "result").exists():
                    looked += looked_at(place)
                    continue
            assert status == 0 or (place / "result").exists(), (place / "error").read_text()
            break
        assert_same_bits(read(place / "result"), wanted)
        assert not {"state", ".state.tmp"} & {*os.listdir(place)} or not name.startswith("fit")
        shutil.rmtree(place)
    return {"killed": killed, "looked": looked, "trials": trials, "lives": lives, "whole": seconds}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
