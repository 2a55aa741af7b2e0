"""What the CUDA allocator says of a step, beside what the time line counts: its snapshot, and its curve.

    with recorded_history(device, "snapshots", "ours") as held:
        step()
    max(held)        # bytes, with the allocator's rounding; for pytorch.org/memory_viz there is snapshots/ours.pickle

Nothing happens on other devices. Written without a GPU at hand: `curve_of` is tested on a record made by hand, the
recording itself has NOT been run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

MOST_ENTRIES: Final = 1_000_000  # that are recorded


@contextmanager
def recorded_history(device: torch.device, directory: str | None, name: str) -> Iterator[list[int]]:
    """Inside, the allocator records; after it the list holds the bytes in use after each allocation and release."""
    held: list[int] = []
    if device.type != "cuda":
        yield held
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.memory._record_memory_history(max_entries=MOST_ENTRIES)
    try:
        yield held
        torch.cuda.synchronize(device)
        snapshot = torch.cuda.memory._snapshot(device)
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(Path(directory) / f"{name}.pickle"))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    index = torch.cuda.current_device() if device.index is None else device.index
    held += curve_of(snapshot["device_traces"][index], before=before)


def curve_of(trace: Sequence[Mapping[str, Any]], *, before: int) -> list[int]:
    """Bytes in use after each entry that changes them; `before` is what was in use when the record began."""
    curve, now = [before], before
    for entry in trace:
        if entry["action"] == "alloc":
            now += entry["size"]
        elif entry["action"] == "free_completed":
            now -= entry["size"]
        else:
            continue
        curve.append(now)
    return curve


__all__ = ["curve_of", "recorded_history"]
