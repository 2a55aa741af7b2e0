"""Measures steps: their times, in turns, and the peak memory of one of them.

Rows take turns, so that a disturbance of the machine hits all alike; every row gets about the same time, hence the fast
ones more repetitions, spread evenly over the rounds. On a CPU live tensors are counted at every operator
(`sdkernels.testing.LiveBytes`), hence the same every time; on a GPU the peak is the allocator's.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sdkernels.testing import LiveBytes

from .rows import MemoryRow, SpeedRow

GIB = 1 << 30
# Of the free memory, what a row may plan to use.
MOST_OF_FREE = 0.8
# Repetitions of a row. One that takes `SLOW` times as long as the fastest is no rival, and gets one less.
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 15
SLOW = 3.0


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call, to the end of the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    steps: Sequence[tuple[SpeedRow, Callable[[], object]]], device: torch.device, seconds_per_row: float
) -> None:
    """Times every step once, then again for about so many seconds a row; the rows take turns."""
    for row, step in steps:
        row.seconds.append(timed(step, device))
    fastest = min(row.seconds[0] for row, _ in steps)
    more = [repetitions(row.seconds[0], fastest, seconds_per_row) - 1 for row, _ in steps]
    rounds = max(more)
    for i in range(rounds):
        for (row, step), turns in zip(steps, more, strict=True):
            if (i + 1) * turns // rounds > i * turns // rounds:
                row.seconds.append(timed(step, device))


def repetitions(seconds: float, fastest: float, seconds_per_row: float) -> int:
    """Says how often to time a row that took `seconds`, the fastest of its group `fastest`. 0 a row: once."""
    if not seconds_per_row:
        return 1
    least = LEAST_REPETITIONS if seconds < SLOW * fastest else LEAST_REPETITIONS - 1
    return min(MOST_REPETITIONS, max(least, round(seconds_per_row / seconds)))


def error_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its text: the reason of a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


@contextmanager
def watch_memory(row: MemoryRow, device: torch.device, compiled: bool) -> Iterator[None]:
    """Fills in the peaks of the block."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        row.live_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    resident_before = _reset_resident_peak()
    if compiled:
        yield
    else:
        with LiveBytes() as probe:
            yield
        row.live_bytes = probe.peak_bytes
    if resident_before is not None:
        row.resident_bytes = _status_bytes("VmHWM") - resident_before


def _reset_resident_peak() -> int | None:
    """Starts the kernel's high-water mark anew; the resident bytes now, or None where there is no such mark."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def free_bytes(device: torch.device) -> float:
    """Counts a CPU's memory with what the kernel would give up for it; infinite where that is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # the allocator's, which it gives again
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def too_large(needed: float, free: float) -> str | None:
    """Returns the reason of a row that would need so many bytes where so many are free; None if it fits."""
    if needed <= MOST_OF_FREE * free:
        return None
    return f"not run: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
