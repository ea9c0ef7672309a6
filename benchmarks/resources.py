"""Time and memory of a process, on the CPU and on CUDA."""

import ctypes
import gc
import resource
import time
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
MIB = 1024**2


class Clock:
    """Seconds, each reading taken once the device has done its work."""

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")

    def __call__(self) -> float:
        """Seconds since some moment."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class PeakMemory:
    """MiB at the peak, over what was held when this object was made.

    On the CPU the peak of the process's resident memory (Linux only; NaN elsewhere), which the
    kernel starts anew when 5 is written to /proc/self/clear_refs; on CUDA that of torch's
    allocator.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / MIB
        elif STATUS.exists():
            _give_back_freed()
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def __call__(self) -> float:
        """MiB at the peak since then."""
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / MIB - self._before
        return _status("VmHWM") - self._before if STATUS.exists() else float("nan")


def limit_memory(gib: float, device: str) -> None:
    """Let the process take at most so much more memory than it has; allocations beyond it fail.

    On CUDA this limits torch's allocator: address space says nothing there.
    """
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 1024 * MIB / total))
    elif STATUS.exists():
        limit = int((_status("VmSize") + 1024 * gib) * MIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _give_back_freed() -> None:
    """Hand freed memory back to the kernel: kept by the allocator, it would hide later use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library alone
    if trim is not None:
        trim(0)


def _status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)
