"""Measures steps: checks them and their memory first, and then their times, in turns.

Rows take turns, so that a disturbance of the machine hits all alike; every row gets about the same time, hence the fast
ones more repetitions, spread evenly over the rounds. On a CPU live tensors are counted at every operator
(`sdkernels.testing.LiveBytes`), hence the same every time; on a GPU the peak is the allocator's.

What a row will need is estimated, so that one that does not fit is said and not tried. The estimates come from measured
peaks (the committed results) and what the peers allocate by their code: 0.85 to 1.7 times the measured peaks at the
shapes of the suite, which a test checks for those whose tensors can be counted. The estimates of whole passes are
`sdcore.prefix.cost`'s and `sdcore.memory`'s.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from sdkernels.live_bytes import LiveBytes

from .rows import MemoryRow, Outcome, PassRow, SpeedRow, Step
from .shapes import DTYPES, MIB, Divergence, Group

GIB = 1 << 30
# Of the free memory, what a row may plan to use.
MOST_OF_FREE = 0.8
# Repetitions of a row. One that takes `SLOW` times as long as the fastest is no rival, and gets one less.
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 15
SLOW = 3.0
FLOAT32: Final = 4
# Arrays of float32 (N, V) at the peak: of a KL, of a JSD, of a top-k with its tail.
LOGIT_ARRAYS: Final = {
    "plain torch": (6.5, 12.5, 3.5),
    "plain torch, no upcast": (6.5, 12.5, 3.5),
    "torch.compile": (3.0, 7.0, 2.0),
    "torch linear_cross_entropy": (4.0, 4.0, 4.0),
    "orda-kernel": (15.5, 15.5, 15.5),
}
# Arrays of float32 (rows, V), of so many rows at a time at most.
CHUNK_ARRAYS: Final = {
    "Liger chunked": (4.0, 8.0),
    "Liger FusedLinearJSD": (4.0, 8.0),
    "Liger FusedLinearJSD, CuTe": (4.0, 8.0),
    "flash-linear-attention": (2.0, 2.0),
}
CHUNK_ROWS: Final = 1024
# TRL's kernel goes through tiles of 4096 rows and 32768 columns, with so many float32 arrays of a tile: KL, JSD.
TRL_ROWS, TRL_COLUMNS = 4096, 32768
TRL_ARRAYS: Final = (11.1, 12.1)
# The workspace, and what a gradient of the head is added up in.
SDCORE_WORKSPACE: Final = 256 * MIB
SDCORE_ARRAYS: Final = 1.4


class Unavailable(Exception):
    """Raised by a contender that cannot run this case; the message says why."""


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


def check_and_time(
    candidates: Iterable[tuple[PassRow, Callable[[], Step]]],
    judge: Callable[[PassRow, Outcome, Outcome], str | None],
    device: torch.device,
    *,
    seconds_per_row: float | None,
    limits: Iterable[tuple[SpeedRow, Callable[[], object]]] = (),
    exact: Outcome | None = None,
    compiled: Collection[str] = (),
) -> None:
    """Fills in the rows of a case: a step's result and memory first, then the times of those that are right.

    A candidate, with what builds its step, is taken up when those before it have been checked; one that has a `reason`
    already is passed over. `judge(row, outcome, first outcome)` notes errors in the row and says why it is not to be
    timed. `limits` are timed with the others, and not checked. With `exact`, the right answer from elsewhere, the first
    outcome is judged by it as well. Without `seconds_per_row` nothing is timed. The bytes of `compiled` contenders are
    those of the process.
    """
    steps: list[tuple[SpeedRow, Callable[[], object]]] = []
    for row, build in candidates:
        if row.reason is not None:
            continue
        usage = MemoryRow(group=row.group, contender=row.contender)
        try:
            step = build()
            with watch_memory(usage, device, row.contender in compiled):
                outcome = step()
        except Exception as error:
            row.reason = error_line(error)
            continue
        row.live_bytes, row.resident_bytes = usage.live_bytes, usage.resident_bytes
        row.gradient_bytes = outcome.gradient_bytes
        if exact is None:
            exact = outcome
        else:
            row.reason = judge(row, outcome, exact)
        del outcome
        if row.reason is None:
            steps.append((row, step))
    exact = None
    if steps and seconds_per_row is not None:
        for limit, products in limits:
            products()
            steps.append((limit, products))
        take_turns(steps, device, seconds_per_row)


def error_line(error: Exception) -> str:
    """Returns the reason of a row: why it is `Unavailable`, or an error's kind and the first line of its text."""
    if isinstance(error, Unavailable):
        return str(error)
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


def too_large(needed: float, free: float | None) -> str | None:
    """Returns the reason of a row that would need so many bytes where so many are free; None if it fits, or may."""
    if free is None or needed <= MOST_OF_FREE * free:
        return None
    return f"not run: needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"


def peak_bytes(contender: str, group: Group, device: str) -> float:
    """Estimates the peak of one step of a contender of the output layer beyond the inputs, gradients included."""
    rows, vocab, hidden = group.shape
    entries = FLOAT32 * rows * vocab
    gradients = DTYPES[group.dtype].itemsize * (rows + vocab) * hidden
    wide = FLOAT32 * vocab * hidden if group.dtype != "fp32" else 0
    which = _kind(group.divergence)
    if contender in LOGIT_ARRAYS:
        # orda-kernel holds whole logits in its torch code only.
        arrays = LOGIT_ARRAYS[contender][which] if contender != "orda-kernel" or device == "cpu" else 2.0
        return gradients + arrays * entries
    if contender in CHUNK_ARRAYS:
        chunk = min(rows, CHUNK_ROWS) * vocab * FLOAT32
        return gradients + wide + CHUNK_ARRAYS[contender][min(which, 1)] * chunk
    if contender == "TRL chunked":
        return gradients + wide + trl_bytes(rows, vocab, min(which, 1))
    return gradients + wide + min(SDCORE_WORKSPACE, SDCORE_ARRAYS * entries)


def group_bytes(group: Group, divergences: Iterable[Divergence]) -> float:
    """Estimates the inputs of a group, the exact answers to all divergences, and the products that are the limit."""
    rows, vocab, hidden = group.shape
    sides = (2 * rows + vocab) * hidden
    width = 2 * FLOAT32 if group.states else FLOAT32  # as `oracle` computes them
    answers = sum(1 for _ in divergences) * width * (rows + vocab) * hidden
    tiles = 640 * MIB  # float64, see `oracle`
    products = DTYPES[group.dtype].itemsize * (2 * rows * vocab + sides)
    return DTYPES[group.dtype].itemsize * sides + width * sides + answers + max(tiles, products)


def model_bytes(config: Any, dtype: str, *, gradients: bool, copies: int = 0, moments: bool = False) -> float:
    """Counts the weights of a configuration, their gradients, copies (teachers) and AdamW's two moments."""
    from ..memory import count_parameters  # with transformers, which the divergence suite does without

    arrays = 1 + gradients + copies + 2 * moments
    return arrays * count_parameters(config).all * DTYPES[dtype].itemsize


def trl_bytes(rows: int, vocab: int, which: int) -> float:
    """Estimates the arrays of a tile of TRL's kernel: `which` is 0 for a KL, 1 for a JSD."""
    return TRL_ARRAYS[which] * FLOAT32 * min(rows, TRL_ROWS) * min(vocab, TRL_COLUMNS)


def _kind(divergence: Divergence) -> int:
    if divergence.topk is not None:
        return 2
    return 0 if divergence.alpha in (0.0, 1.0) else 1
