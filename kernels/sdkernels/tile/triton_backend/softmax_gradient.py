"""Computes the gradient tile of objectives that need no second distribution over the whole vocabulary.

All are, with a row's own numbers, `p` times something, and one entry that differs:

    log-probability of y       g (onehot(y) - p)                    peak = g
    entropy H                  -g p (log p + H)                     level = -g H, tilt = -g
    sampled reverse KL         c (onehot(y) - p)                    peak = c = log p(y) - log q(y)
    tail of a top-k support    B p / P_tail                         level = B, p normalised within the tail

    dz = p (level + tilt log p - peak) + onehot(y) peak

At y the peak's share is `-peak·expm1(log p(y))`, so that it is exact where p(y) is nearly 1. As in divergence.py the
gradient overwrites the raw projections, in float32 or 16 bits; what is needed at y is read before. 4 bytes read and 2
or 4 written per entry.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import FUSED_MULTIPLY_ADD, block_size, config, head_factors, is_padded, on_device
from .formulas import NEAR, columns, exp, final_logits, logit_at, mass_times, phi_near


@triton.jit(do_not_specialize_on_alignment=["p_normalizer", "p_level", "p_tilt", "p_peak", "p_target_ids"])
def softmax_gradient_kernel(
    p_logits,  # (C, V) float32 raw projections, row stride `stride_logits`
    p_bias,  # (V,) or None
    p_normalizer,  # (C,) log-sum-exp that p is relative to
    p_level,  # (C,) or None
    p_tilt,  # (C,) or None
    p_peak,  # (C,) or None
    p_target_ids,  # (C,) int64, where there is a peak
    p_gradient,  # (C, V), the memory of p_logits
    V,
    stride_logits,
    stride_gradient,
    gain,
    cap,
    SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,  # see formulas.columns
    BV: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * stride_logits
    p_gradient += i_row * stride_gradient
    normalizer = tl.load(p_normalizer + i_row)
    # A tail without probability: no entry of it gets any.
    normalizer = tl.where(normalizer == -float("inf"), 0.0, normalizer)
    level, tilt, peak = 0.0, 0.0, 0.0
    if p_level is not None:
        level = tl.load(p_level + i_row)
    if p_tilt is not None:
        tilt = tl.load(p_tilt + i_row)
    if p_peak is not None:
        peak = tl.load(p_peak + i_row)
        i_y = tl.load(p_target_ids + i_row)
        z, chain = logit_at(p_logits, p_bias, i_y, V, gain, cap, SOFTCAP)
        log_p = z - normalizer
        missing = tl.where(log_p > -NEAR, -(log_p + phi_near(log_p)), 1 - exp(log_p))
        at_target = (peak * missing + exp(log_p) * level + tilt * mass_times(exp(log_p), log_p)) * chain
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        b_z, b_chain = final_logits(p_logits, p_bias, o_v, V, gain, cap, SOFTCAP, PADDED)
        b_lp = b_z - normalizer
        b_p = exp(b_lp)
        b_gradient = b_p * (level - peak)
        if p_tilt is not None:
            b_gradient += tilt * mass_times(b_p, b_lp)
        b_gradient = b_gradient * b_chain
        if p_peak is not None:
            b_gradient = tl.where(o_v == i_y, at_target, b_gradient)
        tl.debug_barrier()
        tl.store(p_gradient + o_v, b_gradient.to(p_gradient.dtype.element_ty), mask=columns(o_v, V, PADDED))


def softmax_gradient(
    logits: Tensor,
    bias: Tensor | None,
    head: tuple[float, float | None, float],
    gradient: Tensor,
    *,
    normalizer: Tensor,
    level: Tensor | None = None,
    tilt: Tensor | None = None,
    peak: Tensor | None = None,
    target_ids: Tensor | None = None,
) -> None:
    """Writes into `gradient`, a view of the memory of `logits` (C, V); everything else is (C,)."""
    count, vocab = logits.shape
    chosen = config("softmax_gradient", logits.device, vocab)
    factors = head_factors(head)
    with on_device(logits):
        softmax_gradient_kernel[(count,)](
            logits,
            bias,
            normalizer,
            level,
            tilt,
            peak,
            None if peak is None else target_ids,
            gradient,
            vocab,
            logits.stride(0),
            gradient.stride(0),
            factors.gain,
            factors.cap,
            SOFTCAP=factors.softcap,
            PADDED=is_padded(logits),
            BV=block_size(chosen, vocab),
            STAGES=chosen.stages,
            num_warps=chosen.warps,
            enable_fp_fusion=FUSED_MULTIPLY_ADD,
        )
