"""Computes loss and gradient tile of the full-vocabulary divergences, from the statistics of each row.

Each entry's gradient needs its row's normalisers, and for two of three families one more sum over the row:

    alpha 0     p - q                              none
    alpha 1     -p (u + KL(p‖q))                   the statistics have it (statistics.py)
    between     -(1 - alpha) p (r + KL(p‖m))       a sum over log(m/p), which needs the normalisers first

So a KL takes two passes over the logits, in the second of which the loss is summed as the gradient is written, and
a JSD three: one kernel, launched with ACCUMULATE, without a gradient, and then the other way round. An entry clip
always needs the pass between, for the clipped entries of a row:

    loss = Σ min(e, c) = Σ e - Σ max(e - c, 0)
    dz   = dz without clip + p Σ_clipped D = D - p Σ_kept D    where e < c,    D = d e / d log p
         = -p Σ_kept D                                         elsewhere

with Σ e and dz as above. Of two equal forms, the left one cancels nothing in a row that is hardly clipped, the
right one nothing in one that is clipped nearly everywhere; each row takes the one with less to cancel.

The gradient is with respect to the raw projections and overwrites the student's, in float32, or in 16 bits in the
first half of each row. There a block's output lies over inputs of earlier blocks, and of its own in the first one:
one program owns a row, and a barrier keeps its stores behind all loads of the block. In float32 too, because lanes
beyond a short block repeat its elements, and would read back what was just written. Bytes per entry at 16 bits: KL
8 + 8 + 2, JSD 8 + 8 + 8 + 2, of which the statistics are the first 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import Objective, TileRows
from .configs import FUSED_MULTIPLY_ADD, block_size, config, head_factors, is_padded, on_device
from .formulas import FORWARD_KL, JSD, REVERSE_KL, columns, divergence_terms, final_logits, log_ratio
from .statistics import LSE_STUDENT, LSE_TEACHER, REVERSE_KL_SUM, SHIFT, Statistics

# Rows of the sums array.
LOSS = tl.constexpr(0)
CONSTANT = tl.constexpr(1)
CLIPPED = tl.constexpr(2)
KEPT = tl.constexpr(3)
SUMS = 4


class Family(NamedTuple):
    """Says which formulas, and the factor of `normalize`."""

    number: int
    factor: float


@triton.jit(do_not_specialize=["C"])
def divergence_kernel(
    p_student,  # (C, V) float32, row stride `stride_student`
    p_teacher,  # (C, V) float32, row stride `stride_teacher`
    p_student_bias,  # (V,) or None
    p_teacher_bias,  # (V,) or None
    p_statistics,  # (STATISTICS, C) float32
    p_sums,  # (SUMS, C) float32, written with ACCUMULATE, else read
    p_gradient,  # (C, V) or None: the student's memory, in its dtype or a narrower one
    C,
    V,
    stride_student,
    stride_teacher,
    stride_gradient,
    student_gain,
    student_cap,
    teacher_gain,
    teacher_cap,
    alpha,
    factor,
    entry_clip,  # None for none
    FAMILY: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PADDED: tl.constexpr,  # see formulas.columns
    BV: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_student += i_row * stride_student
    p_teacher += i_row * stride_teacher
    if p_gradient is not None:
        p_gradient += i_row * stride_gradient
    lse_student = tl.load(p_statistics + LSE_STUDENT * C + i_row)
    lse_teacher = tl.load(p_statistics + LSE_TEACHER * C + i_row)
    shift = tl.load(p_statistics + SHIFT * C + i_row)
    constant, clipped, kept = 0.0, 0.0, 0.0
    if FAMILY == REVERSE_KL:
        constant = tl.load(p_statistics + REVERSE_KL_SUM * C + i_row)
    if not ACCUMULATE:
        clipped = tl.load(p_sums + CLIPPED * C + i_row)
        kept = tl.load(p_sums + KEPT * C + i_row)
        if FAMILY == JSD:
            constant = tl.load(p_sums + CONSTANT * C + i_row)
    b_loss_sum, b_constant_sum = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    b_clipped_sum, b_kept_sum = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    b_excess_sum, b_capped_sum = tl.zeros((BV,), tl.float32), tl.zeros((BV,), tl.float32)
    b_size_sum = tl.zeros((BV,), tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        b_z, b_chain = final_logits(
            p_student, p_student_bias, o_v, V, student_gain, student_cap, STUDENT_SOFTCAP, PADDED
        )
        b_z_teacher, _ = final_logits(
            p_teacher, p_teacher_bias, o_v, V, teacher_gain, teacher_cap, TEACHER_SOFTCAP, PADDED
        )
        b_p, b_loss, b_slope, b_constant, b_entry, b_entry_slope = divergence_terms(
            b_z - lse_student, b_z_teacher - lse_teacher, log_ratio(b_z, b_z_teacher, shift), alpha, FAMILY
        )
        if entry_clip is not None:
            is_clipped = b_entry * factor >= entry_clip
        if ACCUMULATE:
            b_loss_sum += b_loss * factor
            b_constant_sum += b_constant
            if entry_clip is not None:
                b_clipped_sum += tl.where(is_clipped, b_entry_slope, 0.0)
                b_kept_sum += tl.where(is_clipped, 0.0, b_entry_slope)
                b_excess_sum += tl.where(is_clipped, b_entry * factor - entry_clip, 0.0)
                b_capped = tl.where(is_clipped, entry_clip, b_entry * factor)
                b_capped_sum += b_capped
                b_size_sum += tl.abs(b_capped)
        if p_gradient is not None:
            b_gradient = b_slope - b_p * constant
            if entry_clip is not None:
                hardly = tl.abs(clipped) < tl.abs(kept)
                b_where_kept = tl.where(hardly, b_gradient + b_p * clipped, b_entry_slope - b_p * kept)
                b_gradient = tl.where(is_clipped, -b_p * kept, b_where_kept)
            b_gradient = b_gradient * factor * b_chain
            tl.debug_barrier()
            tl.store(p_gradient + o_v, b_gradient.to(p_gradient.dtype.element_ty), mask=columns(o_v, V, PADDED))
    if ACCUMULATE:
        loss = tl.sum(b_loss_sum, axis=0)
        if entry_clip is not None:
            excess = tl.sum(b_excess_sum, axis=0)
            cancels_less = loss + excess < tl.sum(b_size_sum, axis=0)
            loss = tl.where(cancels_less, loss - excess, tl.sum(b_capped_sum, axis=0))
        tl.store(p_sums + LOSS * C + i_row, loss)
        tl.store(p_sums + CONSTANT * C + i_row, tl.sum(b_constant_sum, axis=0))
        tl.store(p_sums + CLIPPED * C + i_row, tl.sum(b_clipped_sum, axis=0))
        tl.store(p_sums + KEPT * C + i_row, tl.sum(b_kept_sum, axis=0))


def family_of(objective: Objective) -> Family:
    alpha = objective.alpha
    if alpha in (0.0, 1.0):
        return Family(FORWARD_KL.value if alpha == 0.0 else REVERSE_KL.value, 1.0)
    return Family(JSD.value, 1 / (alpha * (1 - alpha)) if objective.normalize else 1.0)


def full_divergence(
    student: Tensor,
    teacher: Tensor,
    rows: TileRows,
    objective: Objective,
    statistics: Statistics,
    gradient: Tensor | None,
) -> Tensor:
    """Returns the loss (C,) of raw projections (C, V); fills `gradient`, a view of the student's memory."""
    count, vocab = student.shape
    family, alpha = family_of(objective), objective.alpha
    sums = student.new_empty((SUMS, count), dtype=torch.float32)
    chosen = config("divergence" if objective.entry_clip is None else "divergence_clipped", student.device, vocab)
    block = block_size(chosen, vocab)
    student_head, teacher_head = head_factors(objective.student), head_factors(objective.teacher)

    def run(gradient: Tensor | None, *, accumulate: bool) -> None:
        divergence_kernel[(count,)](
            student,
            teacher,
            rows.student_bias,
            rows.teacher_bias,
            statistics.array,
            sums,
            gradient,
            count,
            vocab,
            student.stride(0),
            teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            student_head.gain,
            student_head.cap,
            teacher_head.gain,
            teacher_head.cap,
            alpha,
            family.factor,
            objective.entry_clip,
            FAMILY=family.number,
            STUDENT_SOFTCAP=student_head.softcap,
            TEACHER_SOFTCAP=teacher_head.softcap,
            ACCUMULATE=accumulate,
            PADDED=is_padded(student, teacher),
            BV=block,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            enable_fp_fusion=FUSED_MULTIPLY_ADD,
        )

    with on_device(student):
        if gradient is None or (family.number != JSD.value and objective.entry_clip is None):
            run(gradient, accumulate=True)
        else:
            run(None, accumulate=True)
            run(gradient, accumulate=False)
    return sums[LOSS.value]
