"""Speed, memory and accuracy of the contenders of a group, as rows of plain numbers.

A contender is first checked against the oracle, with its memory watched in the same step, and only then timed. The
contenders of a group and the bare products take turns, so that a disturbance of the machine hits all alike. Every row
gets about the same time, hence the fast ones more repetitions, spread evenly over the rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.oracle import Errors, compare, difference, solve
from benchmarks.peers import Contender, Step, StepResult, Unavailable, four_matmuls, prepare, setting, timed
from benchmarks.shapes import SPEED_NOISE, CaseInputs, Divergence, Group, Shape, make_case_inputs
from sdkernels.testing import LiveBytes

# Repetitions of a row. One that takes `SLOW` times as long as the fastest is no rival, and gets one less.
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 15
SLOW = 3.0
FLOOR = "four matmuls"


@dataclass(kw_only=True)
class SpeedRow:
    """A contender in a group: its times, or why there are none. The floors are rows of their own."""

    group: Group
    contender: str
    setting: str = ""
    seconds: list[float] = field(default_factory=list)
    errors: Errors | None = None  # None for a floor, and for a row that did not run
    reason: str | None = None  # why it was not timed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        if len(self.seconds) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(kw_only=True)
class MemoryRow:
    """Peaks of one step beyond its inputs, in bytes; a gradient is counted in the dtype in which it is returned."""

    group: Group
    contender: str
    live_bytes: int | None = None  # counted by `LiveBytes`, or by the CUDA allocator; None inside compiled graphs
    resident_bytes: int | None = None  # growth of the process; None off Linux and on a GPU
    gradient_bytes: int = 0
    reason: str | None = None


@dataclass(kw_only=True)
class AccuracyRow:
    """Errors against float64 on the same inputs; `loss` itself to show its sign."""

    shape: Shape
    dtype: str
    divergence: Divergence
    noise: float
    contender: str
    errors: Errors | None = None
    loss: float = math.nan
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


def attempt(contender: Contender, inputs: CaseInputs, divergence: Divergence) -> tuple[Step | None, str | None]:
    """A step that has run once (compiled, tuned), or why there is none."""
    try:
        step = prepare(contender, inputs, divergence)
        if contender.compiled:
            step()
    except Unavailable as unavailable:
        return None, str(unavailable)
    except Exception as error:
        return None, _summary(error)
    return step, None


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def measure_group(
    group: Group,
    contenders: Sequence[Contender],
    inputs: CaseInputs,
    exact: StepResult,
    *,
    seconds_per_row: float,
) -> tuple[list[SpeedRow], list[MemoryRow]]:
    """Check, then time all contenders of a group; repetitions come to `seconds_per_row`, or to the least number."""
    device = inputs.device
    steps: list[tuple[SpeedRow, Callable[[], object]]] = []
    speed: list[SpeedRow] = []
    memory: list[MemoryRow] = []
    for dtype in dict.fromkeys(("fp32", group.dtype)):
        row = SpeedRow(group=group, contender=f"{FLOOR} {dtype}")
        speed.append(row)
        floor = four_matmuls(inputs, dtype)
        floor()
        steps.append((row, floor))
    for contender in contenders:
        row = SpeedRow(group=group, contender=contender.name)
        usage = MemoryRow(group=group, contender=contender.name)
        speed.append(row)
        memory.append(usage)
        step, row.reason = attempt(contender, inputs, group.divergence)
        if step is not None:
            row.reason = _check(step, row, usage, exact, device, contender.compiled)
        usage.reason = row.reason
        row.setting = setting(contender, inputs)
        if step is not None and row.reason is None:
            steps.append((row, step))
    _take_turns(steps, device, seconds_per_row)
    return speed, memory


def _check(
    step: Step, row: SpeedRow, usage: MemoryRow, exact: StepResult, device: torch.device, compiled: bool
) -> str | None:
    try:
        with watch_memory(usage, device, compiled):
            result = step()
    except Exception as error:
        return _summary(error)
    usage.gradient_bytes = result.hidden_gradient.nbytes + result.weight_gradient.nbytes
    row.errors = compare(result, exact)
    return difference(row.errors, row.group.dtype)


def _take_turns(
    steps: list[tuple[SpeedRow, Callable[[], object]]], device: torch.device, seconds_per_row: float
) -> None:
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
    """How often to time a row that took `seconds`, where the fastest of its group took `fastest`. 0 a row: once."""
    if not seconds_per_row:
        return 1
    least = LEAST_REPETITIONS if seconds < SLOW * fastest else LEAST_REPETITIONS - 1
    return min(MOST_REPETITIONS, max(least, round(seconds_per_row / seconds)))


def measure_memory(group: Group, contenders: Sequence[Contender], device: str) -> list[MemoryRow]:
    """One step each, for its bytes alone: for shapes at which nothing else is affordable."""
    inputs = make_case_inputs(group.shape, group.dtype, noise=SPEED_NOISE, device=device)
    rows = []
    for contender in contenders:
        row = MemoryRow(group=group, contender=contender.name)
        rows.append(row)
        step, row.reason = attempt(contender, inputs, group.divergence)
        if step is None:
            continue
        try:
            with watch_memory(row, inputs.device, contender.compiled):
                result = step()
        except Exception as error:
            row.reason = _summary(error)
            continue
        row.gradient_bytes = result.hidden_gradient.nbytes + result.weight_gradient.nbytes
    return rows


def measure_accuracy(
    shape: Shape,
    noises: Sequence[float],
    divergences: tuple[Divergence, ...],
    contenders: Sequence[Contender],
    *,
    device: str,
) -> list[AccuracyRow]:
    """Errors of every contender with bfloat16 inputs, the teacher `noise` away from the student."""
    rows = []
    for noise in noises:
        inputs = make_case_inputs(shape, "bf16", noise=noise, device=device)
        exact = solve(inputs, divergences)
        for divergence in divergences:
            for contender in contenders:
                row = AccuracyRow(
                    shape=shape, dtype="bf16", divergence=divergence, noise=noise, contender=contender.name
                )
                rows.append(row)
                step, row.reason = attempt(contender, inputs, divergence)
                if step is None:
                    continue
                try:
                    result = step()
                except Exception as error:
                    row.reason = _summary(error)
                    continue
                row.errors, row.loss = compare(result, exact[divergence]), result.loss.item()
    return rows


__all__ = [
    "FLOOR",
    "AccuracyRow",
    "MemoryRow",
    "SpeedRow",
    "attempt",
    "measure_accuracy",
    "measure_group",
    "measure_memory",
    "repetitions",
]
