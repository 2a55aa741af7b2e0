"""Named cases that gloo processes run in one order, and the comparisons that such cases are made of.

A case is right where what a rank gets for its slice of the head, or its share of the rows, is what one process gets for
all of it; every rank computes that too. The processes are started once for all cases, and leave a file each with their
verdicts.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdkernels import LogitTransform, TeacherMix, linear_divergence
from sdkernels.testing import Run, allowed_error, relative_error, run_operation, run_reference
from tests.processes import verdicts_of

ROW_VALUES = ("loss", "per_token", "student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
GRADIENTS = ("hidden_gradient", "weight_gradient", "bias_gradient")
SECONDS = 30  # a collective that waits this long fails

Cases = dict[str, Callable[[], None]]


def verdicts(cases: Callable[[], Cases], folder: Path, *, ranks: int = 2, seconds: float = 180.0) -> list[Any]:
    """Run the cases in as many processes; of each rank, "" for a case that is right, else why not.

    A case that was not reached in this time is missing: the ranks hung, or died.
    """
    return verdicts_of(_work, folder, cases, str(folder), ranks, ranks=ranks, seconds=seconds)


def _work(rank: int, cases: Callable[[], Cases], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS)
    )
    results = Path(folder, f"{rank}.json")
    found: dict[str, str] = {}
    for case, run in cases().items():
        started = time.monotonic()
        try:
            run()
            found[case] = ""
        except Exception:
            found[case] = traceback.format_exc()
        # Whoever waited for the other in vain is no longer in step with it.
        if "timeout" in found[case].lower() or time.monotonic() - started > SECONDS - 2:
            break
    results.write_text(json.dumps(found))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def piece(tensor: Tensor | None, sizes: tuple[int, ...], rank: int | None = None) -> Tensor | None:
    """A rank's part of the first dimension, this one's by default, as a leaf with memory of its own."""
    if tensor is None:
        return None
    own = tensor.detach().split(sizes)[dist.get_rank() if rank is None else rank].clone()
    return own.requires_grad_(tensor.requires_grad)


def sharded(arguments: dict[str, Any], sizes: tuple[int, ...], rank: int | None = None) -> dict[str, Any]:
    """The arguments of a call as this rank, or another, has them."""

    def head(transform: LogitTransform | None) -> LogitTransform | None:
        return None if transform is None else replace(transform, bias=piece(transform.bias, sizes, rank))

    changes = {
        "student_weight": piece(arguments["student_weight"], sizes, rank),
        "teacher_weight": piece(arguments.get("teacher_weight"), sizes, rank),
        "student_head": head(arguments.get("student_head")),
        "teacher_head": head(arguments.get("teacher_head")),
        "process_group": world(),
    }
    teacher = arguments.get("teacher")
    if isinstance(teacher, TeacherMix):
        changes["teacher"] = replace(teacher, weight=piece(teacher.weight, sizes, rank))
    return arguments | changes


def error(actual: Tensor, exact: Tensor) -> float:
    """Relative to the norm, or to 1 where that is less, as the entropy of a certain row may be."""
    difference, size = (actual.double() - exact.double()).norm(), exact.double().norm().clamp(min=1.0)
    return (difference / size).item()


def in_float64(arguments: dict[str, Any], sizes: tuple[int, ...], limit: float = 1e-10, **run_only: Any) -> None:
    """Values and gradients are those of one process, and the same on all ranks."""
    whole = run_operation(linear_divergence, **arguments, **run_only)
    mine = run_operation(linear_divergence, **sharded(arguments, sizes), **run_only)
    same_on_all_ranks(mine)
    assert mine.output.backend == "torch"
    assert mine.output.active_tokens == whole.output.active_tokens
    errors = {name: error(*pair) for name, pair in pairs(mine, whole, sizes).items()}
    wrong = {name: found for name, found in errors.items() if not found < limit}
    assert wrong == {}, wrong


def in_low_precision(arguments: dict[str, Any], sizes: tuple[int, ...], or_naive: bool = False) -> None:
    """At most twice as far from float64 as one process is, plus two units in the last place.

    With `or_naive` as one process or plain PyTorch, whichever is further, plus the rounding of the largest logit: where
    logits are extreme, which of the three has the smallest error is luck, and differs with the CPU's matrix products.
    """
    exact, units = run_reference(**arguments), 2.0
    # The same formulas: the compiled backend rounds less.
    others = [run_operation(linear_divergence, **arguments | {"backend": "torch"})]
    if or_naive:
        others.append(run_reference(**arguments, naive=True))
        logits = arguments["student_hidden"].double() @ arguments["student_weight"].double().T
        units = max(units, logits.abs().max().item())
    mine = run_operation(linear_divergence, **sharded(arguments, sizes))
    same_on_all_ranks(mine)
    wrong = {}
    of_others = [pairs(mine, other, sizes) for other in others]
    for name, (actual, wanted) in pairs(mine, exact, sizes).items():
        least = units * torch.finfo(actual.dtype).eps
        errors = relative_error(actual, wanted), allowed_error([o[name][1] for o in of_others], wanted) + least
        if not errors[0] <= errors[1]:
            wrong[name] = errors
    assert wrong == {}, wrong


def same_on_all_ranks(run: Run) -> None:
    for name in ROW_VALUES:
        value = getattr(run.output, name)
        if value is not None:
            everyones = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(everyones, value.contiguous())
            assert all(torch.equal(other, value) for other in everyones), f"{name} is not the same on all ranks"


def pairs(mine: Run, whole: Run, sizes: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """What a rank got beside its part of what one process got, by name; both must have it or lack it."""
    found = {}
    for name in (*ROW_VALUES, *GRADIENTS):
        actual, exact = (getattr(run.output if name in ROW_VALUES else run, name) for run in (mine, whole))
        assert (actual is None) == (exact is None), name
        if actual is not None:
            found[name] = actual, piece(exact, sizes) if name in ("weight_gradient", "bias_gradient") else exact
    return found
