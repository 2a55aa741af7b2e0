"""Implements the seam (types.py): row values and gradient from a tile of projections that the driver made.

The matrix products stay with the driver and cuBLAS; the kernels are bound by reading the tile, so what counts is how
often: see the headers of statistics.py (one pass), divergence.py (two in all for the KLs, three for the JSD) and
buckets.py (three). Rows must be contiguous, their stride is free. Rows that start on multiples of 16 entries are read
and written in pieces of 16 bytes whatever V is, and what follows them up to the next such multiple is overwritten;
others, of a V that is no such multiple, in pieces of 4 and 2 bytes, at a fraction of the speed. So is a bias.

float32 only: double precision is the torch backend's. CPU tensors run under TRITON_INTERPRET=1, as the tests do.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...types import Objective, RowValues, TileRows
from ..tiling import gradient_view, tile_columns
from .buckets import topk_divergence
from .divergence import full_divergence
from .softmax_gradient import softmax_gradient
from .statistics import STATISTICS, Statistics, row_statistics
from .topk import group_size, scratch_entries, top_ids

FLOAT32_BYTES = 4
# Statistics of rows and of their tails, sums, and the small vectors of the restricted supports.
VECTORS = 2 * STATISTICS + 8
MOST_SIDES = 3  # student, teacher, and the other teacher of a mix
# Per top-k entry: int64 id, both sides' projections and gradient, torch.topk's own (value, index) and the group ids.
BYTES_PER_CHOSEN = 48


def scratch_bytes(rows: int, vocab: int, device_type: str, topk: int) -> tuple[int, int]:
    """Returns the bytes needed beside a tile's logits, once and per row; `topk` is the objective's, 0 for none."""
    chosen = scratch_entries(vocab, topk) * FLOAT32_BYTES + topk * BYTES_PER_CHOSEN if topk else 0
    padding = MOST_SIDES * (tile_columns(vocab, device_type) - vocab)
    return 0, (VECTORS + padding) * FLOAT32_BYTES + chosen


def divergence_tile(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TileRows,
    objective: Objective,
    *,
    want_gradient: bool,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[RowValues, Tensor | None]:
    """Returns row values, and the gradient with respect to the raw student projection.

    `student_logits` and `teacher_logits` (C, V) float32 are raw projections and are destroyed; no teacher where
    `rows.teacher_ids` is set. The gradient (C, V) lies in the student's memory, in `gradient_dtype` (None: float32); in
    16 bits it fills the first half of each row, so that its row stride is twice the student's.
    """
    _check("student_logits", student_logits)
    if teacher_logits is not None:
        _check("teacher_logits", teacher_logits)
    elif rows.teacher_ids is None:
        raise ValueError("teacher_logits must be given where rows.teacher_ids is not, got neither")
    gradient = gradient_view(student_logits, gradient_dtype) if want_gradient else None
    k = objective.topk if objective.support == "topk" and rows.teacher_ids is None else 0
    statistics, maxima = row_statistics(
        student_logits,
        teacher_logits,
        rows,
        objective,
        group=group_size(student_logits.shape[1], k) if k else 0,
        groups_of=objective.topk_of,
    )
    if objective.support == "sampled":
        loss = _sampled(student_logits, rows, objective, statistics, gradient)
    elif objective.support == "topk" or teacher_logits is None:
        ids = rows.teacher_ids
        if ids is None:
            ids = _support(student_logits, teacher_logits, rows, objective, maxima)
        loss = topk_divergence(student_logits, teacher_logits, ids, rows, objective, statistics, gradient)
    else:
        loss = full_divergence(student_logits, teacher_logits, rows, objective, statistics, gradient)
    has_targets, has_teacher = rows.target_ids is not None, teacher_logits is not None
    values = RowValues(
        loss=loss,
        student_logprobs=statistics.target_student if has_targets else None,
        teacher_logprobs=statistics.target_teacher if has_targets and has_teacher else None,
        student_entropy=statistics.entropy_student,
        teacher_entropy=statistics.entropy_teacher if has_teacher else None,
    )
    return values, gradient


def logprob_tile(
    logits: Tensor,
    rows: TileRows,
    objective: Objective,
    *,
    grad_logprobs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Returns log-probabilities of `rows.target_ids` (C,), entropies (C,), and the tile of upstream gradients' (C,).

    `logits` (C, V) float32 are raw projections; they are destroyed where there is a gradient, which lies in their
    memory as in `divergence_tile`.
    """
    _check("logits", logits)
    statistics, _ = row_statistics(logits, None, rows, objective)
    logprobs = None if rows.target_ids is None else statistics.target_student
    if rows.target_ids is None:
        grad_logprobs = None
    gradient = None
    if grad_logprobs is not None or grad_entropy is not None:
        gradient = gradient_view(logits, gradient_dtype)
        softmax_gradient(
            logits,
            rows.student_bias,
            objective.student,
            gradient,
            normalizer=statistics.lse_student,
            level=None if grad_entropy is None else -grad_entropy.float() * statistics.entropy_student,
            tilt=None if grad_entropy is None else -grad_entropy.float(),
            peak=None if grad_logprobs is None else grad_logprobs.float().contiguous(),
            target_ids=rows.target_ids,
        )
    return logprobs, statistics.entropy_student, gradient


def topk_tile(logits: Tensor, rows: TileRows, objective: Objective, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k most likely ids (C, k) int64, most likely first, and their log-probabilities; keeps `logits`."""
    _check("logits", logits)
    statistics, maxima = row_statistics(logits, None, rows, objective, group=group_size(logits.shape[1], k))
    ids, values = top_ids(logits, rows.student_bias, objective.student, maxima, k)
    return ids, values - statistics.lse_student[:, None]


def _support(student: Tensor, teacher: Tensor | None, rows: TileRows, objective: Objective, maxima: Tensor) -> Tensor:
    """Returns the ids (C, K) of a top-k support, of the side whose maxima the statistics have taken."""
    if teacher is None or objective.topk_of == "student":
        return top_ids(student, rows.student_bias, objective.student, maxima, objective.topk)[0]
    return top_ids(teacher, rows.teacher_bias, objective.teacher, maxima, objective.topk)[0]


def _sampled(
    student: Tensor, rows: TileRows, objective: Objective, statistics: Statistics, gradient: Tensor | None
) -> Tensor:
    """Returns sg(log p(y) - log q(y)) · log p(y), the score-function form of the reverse KL."""
    if gradient is not None:
        softmax_gradient(
            student,
            rows.student_bias,
            objective.student,
            gradient,
            normalizer=statistics.lse_student,
            peak=statistics.target_gap,
            target_ids=rows.target_ids,
        )
    return statistics.target_gap * statistics.target_student


def _check(name: str, logits: Tensor) -> None:
    if logits.dtype != torch.float32:
        raise TypeError(f"{name} must be float32 with backend='triton', got {logits.dtype}; use backend='torch'")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {logits.stride()}")
    if logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{name} must be on a GPU with backend='triton', got a CPU tensor; "
            "use backend='torch', or start Python with TRITON_INTERPRET=1"
        )
