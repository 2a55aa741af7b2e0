"""Takes the statistics of each row of logits, student and teacher in one pass over memory.

One program owns a row and walks over the vocabulary in blocks of BV. The running maximum is one number per row; the
sums that go with it are kept per lane, rescaled by `e^(old maximum - new maximum)`, and added up at the end, so
that a sum of 150,000 terms rounds like one of V/BV. With `w = e^(z - max)` they are, for either side, `S = Σ w` and
`E = Σ w (z - max)`, which under a new maximum becomes `c·(E + (old - new)·S)`, and `D = Σ w_student (z_teacher -
z_student)`:

    log-sum-exp = max + log S          entropy = log S - E / S
    KL(p‖q) = lse_teacher - lse_student - D / S

the last one only as good as the rounding of the logits: it is the constant that the gradient needs before the loss
itself is summed (divergence.py).

`shift`, the teacher's log-sum-exp minus the student's, is taken as the difference of the maxima plus the logarithm
of the ratio of the sums: two nearly equal log-sum-exps would cost it three digits. A loss over the whole row feels
its error only in second order, but not one over a tail beside other buckets, so there (EXCLUDE) a teacher near the
student has its `shift` from `log(1 + Σ w (e^(z_teacher - z_student) - 1) / S)`, whose relative error is that of the
differences. The pass reads each logit once and writes 1/GROUP of a tile where a top-k follows (see topk.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import Objective, TileRows
from .configs import FUSED_MULTIPLY_ADD, block_size, config, head_factors, is_padded, on_device
from .formulas import NEAR, exp, final_logits, log_ratio, logit_at, mass_times, phi_near, rho_near

# Rows of the statistics array; the kernels below and in divergence.py address it by these numbers.
LSE_STUDENT = tl.constexpr(0)
ENTROPY_STUDENT = tl.constexpr(1)
LSE_TEACHER = tl.constexpr(2)
ENTROPY_TEACHER = tl.constexpr(3)
SHIFT = tl.constexpr(4)
REVERSE_KL_SUM = tl.constexpr(5)
TARGET_STUDENT = tl.constexpr(6)
TARGET_TEACHER = tl.constexpr(7)
TARGET_GAP = tl.constexpr(8)
STATISTICS = 9

# Stands for -inf where a product with 0 must be 0: below any logit that matters, and finite.
LOWEST = tl.constexpr(-1.0e30)


class Statistics(NamedTuple):
    """Holds views (C,) into one array, float32; the fields that a call does not compute hold nothing of use."""

    array: Tensor  # (STATISTICS, C)
    lse_student: Tensor
    entropy_student: Tensor
    lse_teacher: Tensor
    entropy_teacher: Tensor
    shift: Tensor  # lse_teacher - lse_student, more exactly
    reverse_kl: Tensor
    target_student: Tensor  # log-probability of target_ids
    target_teacher: Tensor
    target_gap: Tensor  # target_student - target_teacher, more exactly


@triton.jit
def rescale(b_max, b_new, b_sum, b_first):
    """Rescales per-lane S and E to a larger maximum."""
    factor = exp(b_max - b_new)
    return factor * b_sum, factor * (b_first + (b_max - b_new) * b_sum)


@triton.jit
def add_block(b_z, b_max, b_sum, b_first):
    """Adds a block of logits to per-lane S and E, and returns its weights; `b_max` is at least its maximum."""
    b_below = b_z - b_max
    b_weight = exp(b_below)
    return b_sum + b_weight, b_first + b_weight * tl.maximum(b_below, LOWEST), b_weight


@triton.jit(do_not_specialize=["C", "n_groups"], do_not_specialize_on_alignment=["p_target_ids"])
def row_statistics_kernel(
    p_student,  # (C, V) float32, row stride `stride_student`
    p_teacher,  # (C, V) float32 or None
    p_student_bias,  # (V,) or None
    p_teacher_bias,  # (V,) or None
    p_target_ids,  # (C,) int64 or None
    p_statistics,  # (STATISTICS, C) float32
    p_groups,  # (C, n_groups) float32 or None: maxima of GROUP neighbouring logits of the side GROUPS_OF_TEACHER says
    C,
    V,
    stride_student,
    stride_teacher,
    n_groups,
    student_gain,
    student_cap,
    teacher_gain,
    teacher_cap,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    EXCLUDE: tl.constexpr,  # raw projections of -inf are no part of the row, whatever a soft-cap makes of them
    GROUPS_OF_TEACHER: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,  # see formulas.columns
    BV: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_student += i_row * stride_student
    if p_teacher is not None:
        p_teacher += i_row * stride_teacher
    b_max, b_max_teacher = tl.full((), LOWEST, tl.float32), tl.full((), LOWEST, tl.float32)
    b_sum, b_first = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    b_sum_teacher, b_first_teacher = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    b_difference, b_growth = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        b_z, _ = final_logits(
            p_student, p_student_bias, o_v, V, student_gain, student_cap, STUDENT_SOFTCAP, PADDED, EXCLUDE
        )
        # A new maximum is rare: log V times in a row of random logits.
        b_new = tl.maximum(b_max, tl.max(b_z, axis=0))
        if b_new > b_max:
            b_sum, b_first = rescale(b_max, b_new, b_sum, b_first)
            b_difference *= exp(b_max - b_new)
            b_growth *= exp(b_max - b_new)
            b_max = b_new
        b_sum, b_first, b_weight = add_block(b_z, b_max, b_sum, b_first)
        b_grouped = b_z
        if p_teacher is not None:
            b_z_teacher, _ = final_logits(
                p_teacher, p_teacher_bias, o_v, V, teacher_gain, teacher_cap, TEACHER_SOFTCAP, PADDED, EXCLUDE
            )
            b_new = tl.maximum(b_max_teacher, tl.max(b_z_teacher, axis=0))
            if b_new > b_max_teacher:
                b_sum_teacher, b_first_teacher = rescale(b_max_teacher, b_new, b_sum_teacher, b_first_teacher)
                b_max_teacher = b_new
            b_sum_teacher, b_first_teacher, _ = add_block(b_z_teacher, b_max_teacher, b_sum_teacher, b_first_teacher)
            # 0 where both are -inf, also in lanes beyond V: whether a maximum drops a NaN differs between targets.
            b_gap = tl.minimum(tl.maximum(log_ratio(b_z, b_z_teacher, 0.0), LOWEST), -LOWEST)
            b_difference += b_weight * b_gap
            if EXCLUDE:
                b_factor = tl.where(tl.abs(b_gap) < NEAR, b_gap + phi_near(b_gap), exp(b_gap) - 1)
                b_growth += mass_times(b_weight, b_factor)
            if GROUPS_OF_TEACHER:
                b_grouped = b_z_teacher
        if p_groups is not None:
            b_maxima = tl.max(tl.reshape(b_grouped, (BV // GROUP, GROUP)), axis=1)
            o_group = i_v // GROUP + tl.arange(0, BV // GROUP)
            tl.store(p_groups + i_row * n_groups + o_group, b_maxima, mask=o_group < n_groups)

    total = tl.sum(b_sum, axis=0)
    log_total = tl.log(total)
    tl.store(p_statistics + LSE_STUDENT * C + i_row, b_max + log_total)
    tl.store(p_statistics + ENTROPY_STUDENT * C + i_row, log_total - tl.sum(b_first, axis=0) / total)
    if p_teacher is not None:
        total_teacher = tl.sum(b_sum_teacher, axis=0)
        log_total_teacher = tl.log(total_teacher)
        shift = (b_max_teacher - b_max) + tl.log(total_teacher / total)
        if EXCLUDE:
            growth = tl.sum(b_growth, axis=0) / total
            # The comparison is also false for what overflowed.
            shift = tl.where(tl.abs(growth) < NEAR / 2, growth - rho_near(growth, growth / (2 + growth)), shift)
        tl.store(p_statistics + LSE_TEACHER * C + i_row, b_max_teacher + log_total_teacher)
        tl.store(
            p_statistics + ENTROPY_TEACHER * C + i_row,
            log_total_teacher - tl.sum(b_first_teacher, axis=0) / total_teacher,
        )
        tl.store(p_statistics + SHIFT * C + i_row, shift)
        tl.store(p_statistics + REVERSE_KL_SUM * C + i_row, shift - tl.sum(b_difference, axis=0) / total)
    if p_target_ids is not None:
        i_y = tl.load(p_target_ids + i_row)
        z, _ = logit_at(p_student, p_student_bias, i_y, V, student_gain, student_cap, STUDENT_SOFTCAP)
        tl.store(p_statistics + TARGET_STUDENT * C + i_row, (z - b_max) - log_total)
        if p_teacher is not None:
            z_teacher, _ = logit_at(p_teacher, p_teacher_bias, i_y, V, teacher_gain, teacher_cap, TEACHER_SOFTCAP)
            tl.store(p_statistics + TARGET_TEACHER * C + i_row, (z_teacher - b_max_teacher) - log_total_teacher)
            tl.store(p_statistics + TARGET_GAP * C + i_row, shift - (z_teacher - z))


def row_statistics(
    student: Tensor,
    teacher: Tensor | None,
    rows: TileRows,
    objective: Objective,
    *,
    exclude: bool = False,
    group: int = 0,
    groups_of: str = "student",
) -> tuple[Statistics, Tensor]:
    """Takes statistics of raw projections (C, V), and maxima (C, ceil(V / group)) of one side's logits, (C, 0) without.

    `exclude` leaves raw projections of -inf out of the row on both sides.
    """
    count, vocab = student.shape
    array = student.new_empty((STATISTICS, count), dtype=torch.float32)
    groups = student.new_empty((count, triton.cdiv(vocab, group) if group else 0), dtype=torch.float32)
    chosen = config("row_statistics", student.device, vocab)
    block = block_size(chosen, vocab, least=max(group, 1))
    student_head, teacher_head = head_factors(objective.student), head_factors(objective.teacher)
    with on_device(student):
        row_statistics_kernel[(count,)](
            student,
            teacher,
            rows.student_bias,
            rows.teacher_bias if teacher is not None else None,
            rows.target_ids,
            array,
            groups if group else None,
            count,
            vocab,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            groups.shape[1],
            student_head.gain,
            student_head.cap,
            teacher_head.gain,
            teacher_head.cap,
            STUDENT_SOFTCAP=student_head.softcap,
            TEACHER_SOFTCAP=teacher_head.softcap,
            EXCLUDE=exclude,
            GROUPS_OF_TEACHER=groups_of == "teacher",
            GROUP=max(group, 1),
            PADDED=is_padded(student, teacher),
            BV=block,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            enable_fp_fusion=FUSED_MULTIPLY_ADD,
        )
    return Statistics(array, *array.unbind()), groups
