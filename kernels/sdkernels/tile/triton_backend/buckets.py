"""Computes a top-k support: the divergence over K ids and the tail, and its gradient per id and for the tail.

K entries per row are few: they are gathered from the tile, and one program holds a row of them, with the tail as one
more lane, in registers. The mass of the tail is never 1 minus the listed mass, which is all rounding where the ids hold
nearly everything (and then the loss is): the ids' raw projections are overwritten by -inf and the statistics run once
more over what is left, so that its log-sum-exp is exact however small. Only of a cached teacher no more is known.

The tail's gradient goes to each of its tokens by its share of the tail's mass (softmax_gradient.py), which reads the
marked tile; the ids' own entries are put in last. Passes over memory: statistics 8 bytes per entry, tail 8, gradient 4
and what it writes. Without a tail only the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import Objective, TileRows
from .configs import FUSED_MULTIPLY_ADD, MOST_BUCKETS, bucket_config, head_factors, on_device
from .divergence import family_of
from .formulas import NEAR, divergence_terms, exp, log_ratio, phi_near, transformed
from .softmax_gradient import softmax_gradient
from .statistics import LSE_STUDENT, LSE_TEACHER, SHIFT, Statistics, row_statistics

# The mass that the empty tail of a cached teacher is given: log 0 would make its reverse KL infinite, and no float32
# sum of probabilities can tell this from 0.
LEAST_MASS = tl.constexpr(1e-37)


class Buckets(NamedTuple):
    """Holds what a row's buckets give; gradients are with respect to raw projections, the tail's to final logits."""

    loss: Tensor  # (C,)
    id_gradient: Tensor  # (C, K)
    tail_gradient: Tensor  # (C,)


@triton.jit
def log_sum(b_z):
    """Returns the maximum, and the sum of the exponentials relative to it."""
    b_max = tl.max(b_z, axis=0)
    return b_max, tl.sum(exp(b_z - b_max), axis=0)


@triton.jit(do_not_specialize=["C", "K"], do_not_specialize_on_alignment=["p_ids", "p_teacher_logprobs"])
def bucket_kernel(
    p_ids,  # (C, K) int64
    p_student,  # (C, K) float32 raw projections at the ids
    p_teacher,  # (C, K) float32 or None
    p_teacher_logprobs,  # (C, K) float32, where p_teacher is None
    p_student_bias,  # (V,) or None
    p_teacher_bias,  # (V,) or None
    p_statistics,  # (STATISTICS, C) of the whole rows
    p_tail_statistics,  # (STATISTICS, C) of the rows without the ids, or None: no tail
    p_loss,  # (C,)
    p_id_gradient,  # (C, K)
    p_tail_gradient,  # (C,)
    C,
    K,
    student_gain,
    student_cap,
    teacher_gain,
    teacher_cap,
    alpha,
    factor,
    FAMILY: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    is_tail = o_k == K
    b_ids = tl.load(p_ids + i_row * K + o_k, mask=m_k, other=0)
    b_x = tl.load(p_student + i_row * K + o_k, mask=m_k, other=-float("inf"))
    b_z, b_chain = transformed(b_x, p_student_bias, b_ids, m_k, student_gain, student_cap, STUDENT_SOFTCAP)
    if p_tail_statistics is not None:
        lse = tl.load(p_statistics + LSE_STUDENT * C + i_row)
        b_z = tl.where(is_tail, tl.load(p_tail_statistics + LSE_STUDENT * C + i_row), b_z)
    else:
        maximum, total = log_sum(b_z)
        lse = maximum + tl.log(total)
    b_lp = b_z - lse
    if p_teacher is not None:
        b_x = tl.load(p_teacher + i_row * K + o_k, mask=m_k, other=-float("inf"))
        b_z_teacher, _ = transformed(b_x, p_teacher_bias, b_ids, m_k, teacher_gain, teacher_cap, TEACHER_SOFTCAP)
        if p_tail_statistics is not None:
            lse_teacher = tl.load(p_statistics + LSE_TEACHER * C + i_row)
            shift = tl.load(p_statistics + SHIFT * C + i_row)
            b_z_teacher = tl.where(is_tail, tl.load(p_tail_statistics + LSE_TEACHER * C + i_row), b_z_teacher)
        else:
            maximum_teacher, total_teacher = log_sum(b_z_teacher)
            lse_teacher = maximum_teacher + tl.log(total_teacher)
            shift = (maximum_teacher - maximum) + tl.log(total_teacher / total)
        b_lq = b_z_teacher - lse_teacher
        b_u = log_ratio(b_z, b_z_teacher, shift)
        if p_tail_statistics is not None:
            # Better than the difference of log-sum-exps, but NaN where neither side has a tail.
            tail_shift = tl.load(p_tail_statistics + SHIFT * C + i_row)
            b_u = tl.where(is_tail & (b_lp != -float("inf")) & (b_lq != -float("inf")), tail_shift - shift, b_u)
    else:
        b_lq = tl.load(p_teacher_logprobs + i_row * K + o_k, mask=m_k, other=-float("inf"))
        maximum_teacher, total_teacher = log_sum(b_lq)
        listed = maximum_teacher + tl.log(total_teacher)
        if p_tail_statistics is not None:
            missing = tl.where(listed > -NEAR, -(listed + phi_near(listed)), 1 - exp(listed))
            b_lq = tl.where(is_tail, tl.log(tl.where(missing < LEAST_MASS, LEAST_MASS, missing)), b_lq)
        else:
            b_lq = b_lq - listed
        b_u = log_ratio(b_lp, b_lq, 0.0)
    b_p, b_loss, b_slope, b_constant, _, _ = divergence_terms(b_lp, b_lq, b_u, alpha, FAMILY)
    b_gradient = (b_slope - b_p * tl.sum(b_constant, axis=0)) * factor
    tl.store(p_loss + i_row, tl.sum(b_loss, axis=0) * factor)
    tl.store(p_id_gradient + i_row * K + o_k, b_gradient * b_chain, mask=m_k)
    tl.store(p_tail_gradient + i_row, tl.sum(tl.where(is_tail, b_gradient, 0.0), axis=0))


def topk_divergence(
    student: Tensor,
    teacher: Tensor | None,
    ids: Tensor,
    rows: TileRows,
    objective: Objective,
    statistics: Statistics,
    gradient: Tensor | None,
) -> Tensor:
    """Returns the loss (C,) over `ids` (C, K) of raw projections (C, V), which it destroys; fills `gradient`."""
    ids = ids.contiguous()
    k, vocab = ids.shape[1], student.shape[1]
    if k >= MOST_BUCKETS:
        raise ValueError(f"topk must be below {MOST_BUCKETS} with backend='triton', got {k}; use backend='torch'")
    chosen = student.gather(1, ids)
    chosen_teacher = None if teacher is None else teacher.gather(1, ids)
    tail: Statistics | None = None
    if objective.tail and k < vocab:
        for side in (student, teacher):
            if side is not None:
                side.scatter_(1, ids, -torch.inf)
        tail, _ = row_statistics(student, teacher, replace(rows, target_ids=None), objective, exclude=True)
    buckets = _bucket_divergence(ids, chosen, chosen_teacher, rows, objective, statistics, tail)
    if gradient is None:
        return buckets.loss
    if tail is None:
        gradient.zero_()
    else:
        softmax_gradient(
            student,
            rows.student_bias,
            objective.student,
            gradient,
            normalizer=tail.lse_student,
            level=buckets.tail_gradient,
        )
    gradient.scatter_(1, ids, buckets.id_gradient.to(gradient.dtype))
    return buckets.loss


def _bucket_divergence(
    ids: Tensor,
    chosen: Tensor,
    chosen_teacher: Tensor | None,
    rows: TileRows,
    objective: Objective,
    statistics: Statistics,
    tail: Statistics | None,
) -> Buckets:
    count, k = ids.shape
    family = family_of(objective)
    student_head, teacher_head = head_factors(objective.student), head_factors(objective.teacher)
    launch = bucket_config(k + 1)
    values = Buckets(chosen.new_empty(count), torch.empty_like(chosen), chosen.new_empty(count))
    logprobs = None
    if chosen_teacher is None and rows.teacher_logprobs is not None:
        logprobs = rows.teacher_logprobs.to(torch.float32)
    with on_device(chosen):
        bucket_kernel[(count,)](
            ids,
            chosen,
            chosen_teacher,
            logprobs,
            rows.student_bias,
            rows.teacher_bias if chosen_teacher is not None else None,
            statistics.array,
            None if tail is None else tail.array,
            *values,
            count,
            k,
            student_head.gain,
            student_head.cap,
            teacher_head.gain,
            teacher_head.cap,
            objective.alpha,
            family.factor,
            FAMILY=family.number,
            STUDENT_SOFTCAP=student_head.softcap,
            TEACHER_SOFTCAP=teacher_head.softcap,
            BK=launch.block,
            num_warps=launch.warps,
            enable_fp_fusion=FUSED_MULTIPLY_ADD,
        )
    return values
