"""The peak memory of one step: bytes of live tensors, and how much the process grew.

On a CPU live tensors are counted at every operator (`sdkernels.testing.LiveBytes`), hence the same every time; on a GPU
the peak is the allocator's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdkernels.testing import LiveBytes

GIB = 1 << 30
# Of the free memory, what a row may plan to use.
MOST_OF_FREE = 0.8


@dataclass(kw_only=True)
class MemoryRow:
    """Peaks of one step beyond its inputs, in bytes; a gradient is counted in the dtype in which it is returned."""

    group: Any
    contender: str
    live_bytes: int | None = None  # counted by `LiveBytes`, or by the CUDA allocator; None inside compiled graphs
    resident_bytes: int | None = None  # growth of the process; None off Linux and on a GPU
    gradient_bytes: int = 0
    reason: str | None = None


@contextmanager
def watch_memory(row: MemoryRow, device: torch.device, compiled: bool) -> Iterator[None]:
    """Fill in the peaks of the block."""
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
    """Start the kernel's high-water mark anew; the resident bytes now, or None where there is no such mark."""
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
    """Of a CPU's memory with what the kernel would give up for it; infinite where that is not known."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # the allocator's, which it gives again
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def too_large(needed: float, free: float) -> str | None:
    """The reason of a row that would need so many bytes where so many are free; None if it fits."""
    if needed <= MOST_OF_FREE * free:
        return None
    return f"not run: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"


__all__ = ["GIB", "MOST_OF_FREE", "MemoryRow", "free_bytes", "too_large", "watch_memory"]
