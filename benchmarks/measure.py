"""One measurement in a process of its own: reads a request, prints a JSON object as its last line.

Started by `benchmarks.rounds`; the request is {"case", "contender", "device", "threads",
"memory_gib", "seconds"}.
"""

import json
import sys
import warnings
from statistics import median
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.resources import Clock, PeakMemory, limit_memory
from benchmarks.tasks import make, rehearsal

Result = dict[str, Any]
RUNS = 25
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")


def outcome(request: dict[str, Any]) -> Result:
    """What was measured, or in one line why there is nothing."""
    try:
        return {"status": "ok", **measure(request)}
    except MemoryError:
        return {"status": "out of memory"}
    except Exception as error:
        reason = " ".join(str(error).split())
        if any(sign in reason.lower() for sign in OUT_OF_MEMORY):
            return {"status": "out of memory"}
        return {"status": f"failed: {type(error).__name__}: {reason}"[:200]}


def measure(request: dict[str, Any]) -> Result:
    """Seconds of the first run and, by median, of later ones; peak memory of the first.

    Later runs and training steps take turns until the seconds are spent, at least once and at most
    25 times. The first run's own time counts where a second one would find its work done, or where
    it took ten times these seconds.
    """
    case, device = Case.from_plain(request["case"]), request["device"]
    contender, clock = request["contender"], Clock(device)
    torch.set_num_threads(request["threads"])
    make(contender, rehearsal(case), device).run()
    limit_memory(request["memory_gib"], device)
    task = make(contender, case, device)

    memory, start = PeakMemory(device), clock()
    extras = task.run()
    first, peak = clock() - start, memory()
    found = extras()

    task.step()  # whose first call is slower, like that of the task
    seconds, steps = [], [timed(task.step, clock)]
    again = not task.once and first < 10 * request["seconds"]
    end = clock() + request["seconds"]
    while len(steps) <= RUNS and (clock() < end or len(steps) == 1):
        if again:
            seconds.append(timed(task.run, clock))
        steps.append(timed(task.step, clock))
    return {
        "seconds": median(seconds or [first]),
        "first_seconds": first,
        "step_seconds": median(steps),
        "peak_mib": peak,
        **found,
    }


def timed(work: Any, clock: Clock) -> float:
    """Seconds that a call takes."""
    start = clock()
    work()
    return clock() - start


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers announce what they do not support
    result = outcome(json.loads(sys.argv[1]))
    print("\n" + json.dumps(result))
