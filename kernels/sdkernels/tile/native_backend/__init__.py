"""Turns a tile of logits into row values and a gradient tile in C: the torch backend, its element-wise part compiled.

What differs from the obvious: rows are worked on by the threads that torch has for itself (`threads`). A row that float
cannot hold is left as it was and done by the torch backend, in float64.

Not covered, and done by the torch backend as a whole: sampled supports, clipped entries, soft-caps, float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ...types import Objective, RowValues, TileRows
from .. import elementwise, torch_backend
from ..elementwise import narrow_
from ..threads import run_all, shares, together
from ..tiling import gradient_view
from ..torch_backend import logprob_tile, topk_tile
from .build import Job, library
from .products import make_head

TAKES_GAP = True
VALUES = 5  # doubles a row: see `Values` in rows.h
# Of one listed id, in a thread's buffers: see `allocate` in topk.c.
LISTED_BYTES = 56
# Of a tile; less is not worth another thread.
LEAST_ENTRIES = 1 << 15
ALIGNED = 16  # columns, on which shares of threads start


def is_available() -> bool:
    """True where this machine can compile it; takes two seconds when it has not yet."""
    return library() is not None


def scratch_bytes(rows: int, vocab: int, device_type: str, topk: int) -> tuple[int, int]:
    """Returns the bytes needed beside a tile's logits, once and per row; enough for a row that torch does over."""
    once, per_row = torch_backend.scratch_bytes(rows, vocab, device_type, topk)
    of_thread = max(4 * vocab, LISTED_BYTES * (topk + 16))
    return max(once, of_thread * torch.get_num_threads()), per_row


def divergence_tile(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TileRows,
    objective: Objective,
    *,
    want_gradient: bool,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[RowValues, Tensor | None]:
    """Destroys both logits (C, V); the gradient, with respect to the raw projection, lies in `student_logits`."""
    if not _covers(student_logits, teacher_logits, rows, objective):
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
    if teacher_logits is not None and rows.teacher_bias is not None and not rows.teacher_is_gap:
        teacher_logits.add_(rows.teacher_bias)
    rows = replace(rows, student_bias=None, teacher_bias=None)
    gains = _gain(objective.student), _gain(objective.student if rows.teacher_is_gap else objective.teacher)
    at_targets = []
    if rows.target_ids is not None:  # before their places are taken by the gradient
        ids = rows.target_ids[:, None]
        sides = zip((student_logits, teacher_logits), gains, strict=True)
        at_targets = [(side.gather(1, ids)[:, 0] * gain).double() for side, gain in sides if side is not None]
    values, done = _run(student_logits, teacher_logits, rows, objective, gains, want_gradient)
    row_values = _row_values(values, at_targets, teacher_logits is not None, rows.teacher_is_gap, student_logits.dtype)
    for block in _runs_of((~done).nonzero()[:, 0].tolist()):
        teacher = None if teacher_logits is None else teacher_logits[block]
        again, _ = torch_backend.divergence_tile(
            student_logits[block], teacher, rows.part(block), objective, want_gradient=want_gradient
        )
        for column, part in zip(row_values, again, strict=True):
            if column is not None and part is not None:
                column[block] = part
    if not want_gradient:
        return row_values, None
    gradient = gradient_view(student_logits, gradient_dtype)
    if gradient.dtype != student_logits.dtype:
        for row, narrowed in zip(student_logits, gradient, strict=True):
            narrow_(row, narrowed)
    return row_values, gradient


def column_squares(tile: Tensor, weights: Tensor) -> Tensor:
    """Does `elementwise.column_squares` in one pass over the tile."""
    functions = library()
    if functions is None or tile.dtype not in (torch.float32, torch.bfloat16):
        return elementwise.column_squares(tile, weights)
    weights = weights.contiguous()
    sums = weights.new_empty(tile.shape[1])
    parts = shares(len(sums), step=ALIGNED, most=tile.numel() // LEAST_ENTRIES)

    def part(share: int) -> None:
        start, stop = parts[share]
        functions.sdkernels_column_squares(
            ctypes.c_void_p(tile[:, start:].data_ptr()),
            int(tile.dtype == torch.bfloat16),
            *map(ctypes.c_int64, (tile.stride(0), tile.shape[0], stop - start)),
            ctypes.c_void_p(weights.data_ptr()),
            ctypes.c_void_p(sums[start:].data_ptr()),
        )

    run_all(part, len(parts))
    return sums


def _run(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TileRows,
    objective: Objective,
    gains: tuple[float, float],
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns five values of each row (C, VALUES) float64, and whether it could be done (C,)."""
    functions = library()
    if functions is None:
        raise RuntimeError("the native backend has no library: is_available() tells")
    count, vocab = student_logits.shape
    alpha, inner = objective.alpha, 0.0 < objective.alpha < 1.0
    loss_factor = 1 / (alpha * (1 - alpha)) if inner and objective.normalize else 1.0
    values = torch.empty(count, VALUES, dtype=torch.float64)
    done = torch.zeros(count, dtype=torch.bool)
    job = Job(
        student=student_logits.data_ptr(),
        student_stride=student_logits.stride(0),
        rows=count,
        vocab=vocab,
        student_gain=gains[0],
        teacher_gain=gains[1],
        teacher_is_gap=rows.teacher_is_gap,
        kind=2 if inner else int(alpha),
        alpha=alpha,
        loss_factor=loss_factor,
        gradient_factor=gains[0] if want_gradient else 0.0,
        values=values.data_ptr(),
        done=done.data_ptr(),
    )
    if teacher_logits is not None:
        job.teacher, job.teacher_stride = teacher_logits.data_ptr(), teacher_logits.stride(0)
    work = functions.sdkernels_divergence
    ids, logprobs = rows.teacher_ids, rows.teacher_logprobs
    if objective.support == "topk":
        work = functions.sdkernels_topk_divergence
        job.k, job.choose = objective.topk, teacher_logits is not None and objective.topk_of == "teacher"
        if ids is not None:
            job.k, job.ids = ids.shape[1], ids.data_ptr()
        if teacher_logits is None and logprobs is not None:
            job.logprobs = logprobs.data_ptr()
        job.tail = objective.tail and job.k < vocab
    threads = torch.get_num_threads() if count * vocab >= 2 * LEAST_ENTRIES else 1
    together(lambda: work(ctypes.byref(job)), threads)
    return values, done


def _row_values(
    values: Tensor, at_targets: list[Tensor], has_teacher: bool, teacher_is_gap: bool, dtype: torch.dtype
) -> RowValues:
    """Sorts the library's values; `at_targets` has the final logit of each side's target, or the gap, if any."""
    loss, student_log_sum, teacher_log_sum, student_entropy, teacher_entropy = values.unbind(1)
    student_logprobs = teacher_logprobs = None
    if at_targets:
        student = at_targets[0]
        student_logprobs = (student - student_log_sum).to(dtype)
        if has_teacher:
            teacher = student + at_targets[1] if teacher_is_gap else at_targets[1]
            teacher_logprobs = (teacher - teacher_log_sum).to(dtype)
    return RowValues(
        loss.to(dtype),
        student_logprobs,
        teacher_logprobs,
        student_entropy.to(dtype),
        teacher_entropy.to(dtype) if has_teacher else None,
    )


def _runs_of(places: list[int]) -> Iterator[slice]:
    """Yields neighbouring rows together."""
    for _, run in groupby(enumerate(places), key=lambda place: place[1] - place[0]):
        members = [row for _, row in run]
        yield slice(members[0], members[-1] + 1)


def _covers(student_logits: Tensor, teacher_logits: Tensor | None, rows: TileRows, objective: Objective) -> bool:
    heads = (objective.student, objective.teacher)
    sides = [side for side in (student_logits, teacher_logits, rows.teacher_logprobs) if side is not None]
    return (
        objective.support in ("full", "topk")
        and len(sides) > 1
        and objective.entry_clip is None
        and all(softcap is None for _, softcap, _ in heads)
        and all(side.dtype == torch.float32 for side in sides)
        and all(side.stride(-1) == 1 for side in sides[:2])
    )


def _gain(head: tuple[float, float | None, float]) -> float:
    scale, _, temperature = head
    return scale / temperature


__all__ = [
    "TAKES_GAP",
    "column_squares",
    "divergence_tile",
    "is_available",
    "logprob_tile",
    "make_head",
    "scratch_bytes",
    "topk_tile",
]
