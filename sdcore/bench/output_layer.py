"""Measures the contenders of the output layer: their speed and memory in a group, and their errors.

A contender is first checked against the oracle, with its memory watched in the same step, and only then timed, in turns
with the others and the bare products.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from .contender import Contender, Step, attempt, bare_matmuls, floor_name
from .estimate import peak_bytes
from .measure import error_line, free_bytes, take_turns, too_large, watch_memory
from .oracle import compare, difference, solve
from .peers import setting
from .rows import AccuracyRow, MemoryRow, SpeedRow, StepResult
from .shapes import SPEED_NOISE, CaseInputs, Divergence, Group, Shape, make_case_inputs


def measure_group(
    group: Group,
    contenders: Sequence[Contender],
    inputs: CaseInputs,
    exact: StepResult,
    *,
    seconds_per_row: float,
) -> tuple[list[SpeedRow], list[MemoryRow]]:
    """Checks, then times all contenders of a group; repetitions come to `seconds_per_row`, or to the least number."""
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
            result, row.reason = _watched(step, usage, device, contender.compiled)
            if result is not None:
                row.errors = compare(result, exact)
                row.reason = difference(row.errors, group.dtype)
        usage.reason = row.reason
        row.setting = setting(contender, inputs)
        if step is not None and row.reason is None:
            steps.append((row, step))
    take_turns(steps, device, seconds_per_row)
    return speed, memory


def _watched(
    step: Step, usage: MemoryRow, device: torch.device, compiled: bool
) -> tuple[StepResult | None, str | None]:
    """Runs a step and fills in its bytes; returns its result, or the reason why there is none."""
    try:
        with watch_memory(usage, device, compiled):
            result = step()
    except Exception as error:
        return None, error_line(error)
    usage.gradient_bytes = result.hidden_gradient.nbytes + result.weight_gradient.nbytes
    return result, None


def measure_memory(group: Group, contenders: Sequence[Contender], device: str) -> list[MemoryRow]:
    """Runs a step of each, for its bytes alone: for shapes at which nothing else is affordable."""
    inputs = make_case_inputs(group.shape, group.dtype, noise=SPEED_NOISE, device=device)
    rows = []
    for contender in contenders:
        row = MemoryRow(group=group, contender=contender.name)
        rows.append(row)
        step, row.reason = attempt(contender, inputs, group.divergence)
        if step is not None:
            _, row.reason = _watched(step, row, inputs.device, contender.compiled)
    return rows


def measure_accuracy(
    shape: Shape,
    noises: Sequence[float],
    divergences: tuple[Divergence, ...],
    contenders: Sequence[Contender],
    *,
    device: str,
) -> list[AccuracyRow]:
    """Measures the errors of every contender with bfloat16 inputs, the teacher `noise` away from the student."""
    rows = []
    for noise in noises:
        inputs = make_case_inputs(shape, "bf16", noise=noise, device=device)
        exact = solve(inputs, divergences)
        for divergence, contender in itertools.product(divergences, contenders):
            row = AccuracyRow(shape=shape, dtype="bf16", divergence=divergence, noise=noise, contender=contender.name)
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
