"""Speed, memory and accuracy of the contenders of a group, as rows of plain numbers.

A contender is first checked against the oracle, with its memory watched in the same step, and only then timed, in turns
with the others and the bare products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .estimate import peak_bytes
from .live_memory import MemoryRow, free_bytes, too_large, watch_memory
from .oracle import Errors, compare, difference, solve
from .peers import Contender, Step, StepResult, Unavailable, bare_matmuls, floor_name, prepare, setting
from .shapes import SPEED_NOISE, CaseInputs, Divergence, Group, Shape, make_case_inputs
from .timing import SpeedRow, error_line, take_turns


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


def attempt(contender: Contender, inputs: CaseInputs, divergence: Divergence) -> tuple[Step | None, str | None]:
    """A step that has run once (compiled, tuned), or why there is none."""
    try:
        step = prepare(contender, inputs, divergence)
        if contender.compiled:
            step()
    except Unavailable as unavailable:
        return None, str(unavailable)
    except Exception as error:
        return None, error_line(error)
    return step, None


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
    # A CPU may be slower in bfloat16 than in float32; a GPU is not.
    for dtype in dict.fromkeys((group.dtype,) if device.type == "cuda" else ("fp32", group.dtype)):
        row = SpeedRow(group=group, contender=f"{floor_name(inputs)} {dtype}")
        speed.append(row)
        floor = bare_matmuls(inputs, dtype)
        floor()
        steps.append((row, floor))
    for contender in contenders:
        row = SpeedRow(group=group, contender=contender.name)
        usage = MemoryRow(group=group, contender=contender.name)
        speed.append(row)
        memory.append(usage)
        step = None
        row.reason = too_large(peak_bytes(contender.name, group, device.type), free_bytes(device))
        if row.reason is None:
            step, row.reason = attempt(contender, inputs, group.divergence)
        if step is not None:
            row.reason = _check(step, row, usage, exact, device, contender.compiled)
        usage.reason = row.reason
        row.setting = setting(contender, inputs)
        if step is not None and row.reason is None:
            steps.append((row, step))
    take_turns(steps, device, seconds_per_row)
    return speed, memory


def _check(
    step: Step, row: SpeedRow, usage: MemoryRow, exact: StepResult, device: torch.device, compiled: bool
) -> str | None:
    try:
        with watch_memory(usage, device, compiled):
            result = step()
    except Exception as error:
        return error_line(error)
    usage.gradient_bytes = result.hidden_gradient.nbytes + result.weight_gradient.nbytes
    row.errors = compare(result, exact)
    return difference(row.errors, row.group.dtype)


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
            row.reason = error_line(error)
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
                    row.reason = error_line(error)
                    continue
                row.errors, row.loss = compare(result, exact[divergence]), result.loss.item()
    return rows


__all__ = ["AccuracyRow", "attempt", "measure_accuracy", "measure_group", "measure_memory"]
