"""Row values and gradient tile from a tile of logits, in C: the torch backend with its element-wise part compiled.

What differs from the obvious: rows are divided among Python threads, for which ctypes lets go of the interpreter's
lock, so that the library needs no OpenMP of its own beside torch's. A row that float cannot hold is left as it was and
done by the torch backend, in float64.

Not covered, and done by the torch backend as a whole: top-k and sampled supports, cached teachers, clipped entries,
soft-caps, float64.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from .. import torch_backend
from ..elementwise import narrow_
from ..support import gradient_view
from ..torch_backend import logprob_tile, scratch_bytes, topk_tile
from ..types import Objective, RowValues, TileRows
from .build import library

TAKES_GAP = True
VALUES = 5  # doubles a row: see `Values` in divergence.c
# Of a tile; less is not worth another thread.
LEAST_ENTRIES = 1 << 15


def is_available() -> bool:
    """Whether this machine can compile it; takes two seconds when it has not yet."""
    return library() is not None


def divergence_tile(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TileRows,
    objective: Objective,
    *,
    want_gradient: bool,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[RowValues, Tensor | None]:
    """Both logits (C, V) are destroyed; the gradient, with respect to the raw projection, lies in `student_logits`."""
    if teacher_logits is None or not _covers(student_logits, teacher_logits, objective):
        return torch_backend.divergence_tile(
            student_logits,
            teacher_logits,
            rows,
            objective,
            want_gradient=want_gradient,
            gradient_dtype=gradient_dtype,
        )
    if rows.student_bias is not None:
        student_logits.add_(rows.student_bias)
    if rows.teacher_bias is not None and not rows.teacher_is_gap:
        teacher_logits.add_(rows.teacher_bias)
    rows = replace(rows, student_bias=None, teacher_bias=None)
    gains = _gain(objective.student), _gain(objective.student if rows.teacher_is_gap else objective.teacher)
    at_targets = None
    if rows.target_ids is not None:  # before their places are taken by the gradient
        ids = rows.target_ids[:, None]
        sides = zip((student_logits, teacher_logits), gains, strict=True)
        at_targets = [(logits.gather(1, ids)[:, 0] * gain).double() for logits, gain in sides]
    values, done = _run(student_logits, teacher_logits, rows.teacher_is_gap, objective, gains, want_gradient)
    found = _row_values(values, at_targets, rows.teacher_is_gap, student_logits.dtype)
    for block in _runs_of((~done).nonzero()[:, 0].tolist()):
        again, _ = torch_backend.divergence_tile(
            student_logits[block], teacher_logits[block], rows.part(block), objective, want_gradient=want_gradient
        )
        for column, part in zip(found, again, strict=True):
            if column is not None and part is not None:
                column[block] = part
    if not want_gradient:
        return found, None
    gradient = gradient_view(student_logits, gradient_dtype)
    if gradient.dtype != student_logits.dtype:
        for row, narrowed in zip(student_logits, gradient, strict=True):
            narrow_(row, narrowed)
    return found, gradient


def _run(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_is_gap: bool,
    objective: Objective,
    gains: tuple[float, float],
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Five values of each row (C, VALUES) float64, and whether it could be done (C,)."""
    found = library()
    if found is None:
        raise RuntimeError("the native backend has no library: is_available() tells")
    count, vocab = student_logits.shape
    alpha, inner = objective.alpha, 0.0 < objective.alpha < 1.0
    loss_factor = 1 / (alpha * (1 - alpha)) if inner and objective.normalize else 1.0
    slope = (1 - alpha) * loss_factor if inner else 1.0
    values = torch.empty(count, VALUES, dtype=torch.float64)
    done = torch.zeros(count, dtype=torch.bool)

    def part(start: int, stop: int) -> None:
        found.sdkernels_divergence(
            student_logits[start].data_ptr(),
            student_logits.stride(0),
            gains[0],
            teacher_logits[start].data_ptr(),
            teacher_logits.stride(0),
            gains[1],
            teacher_is_gap,
            stop - start,
            vocab,
            2 if inner else int(alpha),
            alpha,
            loss_factor,
            gains[0] * slope if want_gradient else 0.0,
            values[start].data_ptr(),
            done[start:].data_ptr(),
        )

    threads = max(1, min(torch.get_num_threads(), count, count * vocab // LEAST_ENTRIES))
    bounds = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        part(0, count)
    else:
        list(_pool(threads).map(part, bounds[:-1], bounds[1:]))
    return values, done


def _row_values(values: Tensor, at_targets: list[Tensor] | None, teacher_is_gap: bool, dtype: torch.dtype) -> RowValues:
    loss, student_log_sum, teacher_log_sum, student_entropy, teacher_entropy = values.unbind(1)
    student_logprobs = teacher_logprobs = None
    if at_targets is not None:
        student, teacher = at_targets
        teacher = student + teacher if teacher_is_gap else teacher
        student_logprobs = (student - student_log_sum).to(dtype)
        teacher_logprobs = (teacher - teacher_log_sum).to(dtype)
    return RowValues(
        loss.to(dtype), student_logprobs, teacher_logprobs, student_entropy.to(dtype), teacher_entropy.to(dtype)
    )


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sdkernels")


if hasattr(os, "register_at_fork"):
    # A forked process has none of its parent's threads, and would wait for them.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _runs_of(places: list[int]) -> Iterator[slice]:
    """Neighbouring rows together."""
    for _, run in groupby(enumerate(places), key=lambda place: place[1] - place[0]):
        members = [row for _, row in run]
        yield slice(members[0], members[-1] + 1)


def _covers(student_logits: Tensor, teacher_logits: Tensor, objective: Objective) -> bool:
    heads = (objective.student, objective.teacher)
    return (
        objective.support == "full"
        and objective.entry_clip is None
        and all(softcap is None for _, softcap, _ in heads)
        and all(one.dtype == torch.float32 and one.stride(-1) == 1 for one in (student_logits, teacher_logits))
    )


def _gain(head: tuple[float, float | None, float]) -> float:
    scale, _, temperature = head
    return scale / temperature


__all__ = ["TAKES_GAP", "divergence_tile", "is_available", "logprob_tile", "scratch_bytes", "topk_tile"]
