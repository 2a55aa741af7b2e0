"""Runs a loss through the situations, in a process of its own, and judges what comes back.

A result is right, off by a number, refused clearly, refused unclearly, crashed or not offered. It is off where loss or
a gradient is further from float64 than `FLOORS` allows for the dtype: at least four times what textbook code in plain
torch is off by wherever that code is right at all (a test holds both), so that nobody is called wrong for rounding. The
relative error of a tensor is that of its norm; where the truth is 0 it is the norm itself.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from sdkernels.live_bytes import LiveBytes
from sdkernels.testing import relative_error

from ..errors import ArgumentError
from ..rollouts.named import load
from .adapters import ADAPTERS, Adapter, NotOffered
from .cases import OPTIONS, Case, truth
from .situations import SITUATIONS, Situation

FLOORS: Final = {"fp32": 5e-4, "fp16": 0.04, "bf16": 0.05}
SECONDS: Final = 300  # for one situation, imports included: on a busy machine, in an interpreter
RIGHT, OFF, CLEAR, UNCLEAR = "right", "off", "refused clearly", "refused unclearly"
CRASHED, ABSENT = "crashed", "not offered"
PARAMETERS: Final = {"hidden": "student_hidden", "weight": "student_weight", "bias": "bias"}


class Result(NamedTuple):
    """Says how a situation went."""

    kind: str
    off: float | None = None  # times the truth; in situations about memory, matrices of logits
    note: str = ""  # what is off, or what the error said


def measured(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """Calls a loss on fresh leaves and returns the loss and the gradients of `PARAMETERS`, and of the teacher's."""
    call = dict(case.call)
    for name, tensor in call.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            call[name] = tensor.detach().requires_grad_()
    if case.call.get("teacher_weight") is case.call["student_weight"]:
        call["teacher_weight"] = call["student_weight"]

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
            output = function(**call)
        return output if isinstance(output, Tensor) else output.loss

    def backward(loss: Tensor, **options: Any) -> None:
        upstream = None if case.upstream is None else torch.as_tensor(case.upstream, dtype=loss.dtype)
        loss.backward(None if upstream is None else upstream.expand_as(loss), **options)

    if not case.gradients:
        with torch.no_grad():
            return {"loss": forward()}
    loss = forward()
    second = forward() if case.passes == "interleaved" else None
    backward(loss, **({"retain_graph": True} if case.passes == "twice" else {}))
    if case.passes == "twice":
        backward(loss)
    elif second is not None or case.passes == "accumulate":
        backward(forward() if second is None else second)
    values = {"loss": loss.detach()}
    for name, parameter in PARAMETERS.items():
        leaf = call.get(parameter)
        if leaf is not None and leaf.requires_grad:
            values[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    for name in ("teacher_hidden", "teacher_weight"):
        leaf = call.get(name)
        if leaf is not None and leaf.requires_grad and leaf is not call["student_weight"] and leaf.grad is not None:
            values[name] = leaf.grad
    return values


def _lowest_row(function: Callable[..., Any], case: Case) -> float:
    call = case.call
    rows = range(len(call["student_hidden"]))
    sides = ("student_hidden", "teacher_hidden")
    with torch.no_grad():
        losses = [function(**call | {name: call[name][row : row + 1] for name in sides}) for row in rows]
    return min(float(loss if isinstance(loss, Tensor) else loss.loss) for loss in losses)


def _growth(function: Callable[..., Any], case: Case) -> float:
    """Returns how many float32 matrices of logits more are live at the peak with twice as many rows."""

    def peak(rows: int) -> int:
        call = case.call | {name: case.call[name][:rows] for name in ("student_hidden", "teacher_hidden")}
        with LiveBytes() as live:
            measured(function, Case(call, case.dtype))
        return live.peak_bytes

    rows = len(case.call["student_hidden"])
    return (peak(rows) - peak(rows // 2)) / (rows // 2 * len(case.call["student_weight"]) * 4)


def _deviation(values: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """Returns the largest relative error and what has it."""
    worst, where = 0.0, ""
    for name, value in values.items():
        right = exact.get(name, torch.zeros_like(value, dtype=torch.float64))
        if value.shape != right.shape:
            return math.inf, f"{name} of shape {tuple(value.shape)} instead of {tuple(right.shape)}"
        error, label = relative_error(value, right), name if name == "loss" else f"gradient of {name}"
        if not math.isfinite(error):
            return error, f"NaN or infinity in the {label}"
        if error > worst:
            worst, where = error, label
    return worst, where


def judge(function: Callable[..., Any], situation: Situation) -> Result:
    """Runs one situation here and now."""
    case = situation.make()
    exact = truth(case) if case.check == "value" else {}
    try:
        if unknown := sorted(case.call.keys() - _offered(function)):
            return Result(ABSENT, note=f"has no {', '.join(unknown)}")
        if case.check == "sign":
            lowest = _lowest_row(function, case)
            return Result(OFF, lowest, "the lowest loss of a row") if not lowest >= 0 else Result(RIGHT)
        if case.check == "memory":
            growth = _growth(function, case)
            return Result(OFF, growth, "matrices of logits") if growth > 0.25 else Result(RIGHT)
        values = measured(function, case)
        if case.check == "refusal":
            return Result(OFF, note="accepted")
        if case.passes == "repeated":
            error, where = _deviation(values, {k: v.double() for k, v in measured(function, case).items()})
            return Result(OFF, error, where) if error else Result(RIGHT, error)
        error, where = _deviation(values, exact)
        if not math.isfinite(error):
            return Result(OFF, note=where)
        return Result(RIGHT if error <= FLOORS[case.dtype] else OFF, error, where)
    except NotOffered as reason:
        return Result(ABSENT, note=str(reason))
    except Exception as error:  # whatever a peer raises is its answer
        words = situation.words or tuple(case.call)
        text = " ".join(str(error).split())
        clear = any(word in text.lower() for word in words)
        return Result(CLEAR if clear else UNCLEAR, note=f"{type(error).__name__}: {text}"[:300])


def _offered(function: Callable[..., Any]) -> set[str]:
    """Returns the arguments that a loss takes."""
    if isinstance(function, Adapter):
        return set(function.offers.split())
    parameters = inspect.signature(function).parameters.values()
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return set(OPTIONS) if everything else {parameter.name for parameter in parameters}


def named(target: str) -> Callable[..., Any]:
    """Returns the adapter of this name, or what `load` finds; raises `ArgumentError` for what is neither."""
    if target in ADAPTERS:
        return ADAPTERS[target]
    if ":" not in target:
        known = ", ".join(ADAPTERS)
        raise ArgumentError(f"expected MODULE:FUNCTION, FILE.py:FUNCTION or one of {known}, got {target!r}")
    function = load(target)
    if missing := [name for name in ("student_hidden", "student_weight", "alpha") if name not in _offered(function)]:
        meanings = ", ".join(f"{name} ({OPTIONS[name]})" for name in missing)
        raise ArgumentError(f"{target} must take {meanings}; `sdcore conform --help` has the signature")
    return function


def results(target: str, *, seconds: float = SECONDS) -> Iterator[tuple[str, Result]]:
    """Runs all situations in a process of its own; one that it dies in, or stays in for `seconds`, has crashed."""
    function, names, start = named(target), list(SITUATIONS), 0
    environment = {**os.environ, **(function.environment if isinstance(function, Adapter) else {})}
    while start < len(names):
        command = [sys.executable, "-m", "sdcore.conform.runner", target, str(start)]
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process = subprocess.Popen(command, env=environment, **output)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while start < len(names):
                line = lines.get(timeout=seconds)
                if line is None:
                    yield names[start], Result(CRASHED, note=f"the process ended with {process.wait()}")
                    start += 1
                    break
                yield names[start], Result(*json.loads(line))
                start += 1
        except queue.Empty:
            yield names[start], Result(CRASHED, note=f"no answer in {seconds:g} s")
            start += 1
        finally:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    if process.stdout is not None:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _child(target: str, start: str) -> None:
    """Answers a line a situation on what was stdout, which is left to nobody else."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    function = named(target)
    for name, situation in list(SITUATIONS.items())[int(start) :]:
        if situation.heavy and "TRITON_INTERPRET" in os.environ:
            result = Result(ABSENT, note="not run: takes minutes in Triton's interpreter")
        elif name == "memory" and isinstance(function, Adapter) and function.all_logits:
            result = Result(ABSENT, note=function.all_logits)
        else:
            result = judge(function, situation)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    _child(*sys.argv[1:])
