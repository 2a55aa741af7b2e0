"""Says what a contender of the output layer is, and makes a step of it.

`prepare` is the one set-up function: speed, memory, accuracy and the pytest-benchmark entries all call the step that
it returns, a forward and a backward pass to the gradients of the student's hidden states and of the head. A contender
that cannot run raises `Unavailable` with the reason, which becomes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from .measure import error_line
from .rows import FLOOR, FROZEN_FLOOR, StepResult
from .shapes import DTYPES, CaseInputs, Divergence

Loss = Callable[[], Tensor]
Step = Callable[[], StepResult]


class Unavailable(Exception):
    """Raised by a contender that cannot run this case; the message says why."""


@dataclass(frozen=True)
class Contender:
    """Has `build(inputs, divergence)`, which returns a function of no arguments to the mean loss, in the graph."""

    name: str
    build: Callable[[CaseInputs, Divergence], Loss]
    peer: str = ""  # what `--peers` calls it; empty: ours
    # The bytes of a compiled graph are allocated where `LiveBytes` does not see them.
    compiled: bool = False
    colour: str = "black"
    marker: str = "o"  # in line plots


def skipped(contender: Contender, reason: str) -> Contender:
    """Returns the same row without a run."""

    def build(inputs: CaseInputs, divergence: Divergence) -> Loss:
        raise Unavailable(reason)

    return replace(contender, build=build)


def prepare(contender: Contender, inputs: CaseInputs, divergence: Divergence) -> Step:
    """Makes a step of `contender`; raises `Unavailable`."""
    loss_of = contender.build(inputs, divergence)
    frozen = not inputs.student_weight.requires_grad
    leaves = (inputs.student_hidden,) if frozen else (inputs.student_hidden, inputs.student_weight)

    def step() -> StepResult:
        loss = loss_of()
        gradients = torch.autograd.grad(loss, leaves)
        return StepResult(loss.detach(), gradients[0], gradients[0].new_empty(0) if frozen else gradients[1])

    return step


def require(module: str, package: str) -> None:
    """Raises `Unavailable`, with how to install `package`, where its `module` is missing."""
    if find_spec(module) is None:
        raise Unavailable(f"not installed: pip install {package}")


def attempt(contender: Contender, inputs: CaseInputs, divergence: Divergence) -> tuple[Step | None, str | None]:
    """Returns a step that has run once if it is compiled or tuned, or why there is none."""
    try:
        step = prepare(contender, inputs, divergence)
        if contender.compiled:
            step()
    except Unavailable as unavailable:
        return None, str(unavailable)
    except Exception as error:
        return None, error_line(error)
    return step, None


def floor_name(inputs: CaseInputs) -> str:
    """Names the row of `bare_matmuls`, before its dtype."""
    return FLOOR if inputs.student_weight.requires_grad else FROZEN_FLOOR


def bare_matmuls(inputs: CaseInputs, dtype: str) -> Callable[[], None]:
    """Makes the floor: two projections, the gradients of the hidden states and, if it is trained, of the head.

    All go into outputs that are there before.
    """
    frozen = not inputs.student_weight.requires_grad
    hidden, weight, teacher_hidden = (tensor.detach().to(DTYPES[dtype]) for tensor in inputs)
    student_logits = hidden.new_empty(len(hidden), len(weight))
    teacher_logits = torch.empty_like(student_logits)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.T, out=student_logits)
        torch.mm(teacher_hidden, weight.T, out=teacher_logits)
        torch.mm(student_logits, weight, out=hidden_gradient)
        if not frozen:
            torch.mm(student_logits.T, hidden, out=weight_gradient)

    return products
