"""Finds the k most likely ids of each row, exactly, for one look at each logit.

A row is divided into groups of GROUP neighbouring logits, and the statistics pass leaves the maximum of each. The k
groups with the largest maxima hold a top k of the row: whatever exceeds the k-th largest maximum lies in one of
them, and they hold at least k entries that reach it. So `torch.topk` selects k groups from V/GROUP maxima, a kernel
collects their k·GROUP logits, and `torch.topk` selects among those. Selection itself is left to torch: its radix
select reads a row several times, which is nothing on lists this short, where a bitonic sort of the whole row in
registers would cost hundreds of instructions per entry. GROUP near sqrt(V/k) makes both lists shortest: together
2·sqrt(V·k) entries, 8,000 for V = 152,000 and k = 100.

Ties are broken as torch.topk does. In a row with NaN or without k finite logits the ids are within range and no more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import FUSED_MULTIPLY_ADD, head_factors, on_device
from .formulas import transformed

LEAST_GROUP, MOST_GROUP = 4, 64
CANDIDATES_PER_PROGRAM = 1024
CANDIDATE_WARPS = 4


@triton.jit
def candidates_kernel(
    p_logits,  # (C, V) float32 raw projections, row stride `stride_logits`
    p_bias,  # (V,) or None
    p_group_ids,  # (C, n_chosen) int64
    p_candidates,  # (C, n_candidates) float32: final logits of the chosen groups, -inf beyond V
    V,
    stride_logits,
    n_chosen,
    n_candidates,
    gain,
    cap,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    BC: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < n_candidates
    b_group = tl.load(p_group_ids + i_row * n_chosen + o_c // GROUP, mask=m_c, other=0)
    o_v = b_group * GROUP + o_c % GROUP
    m_v = m_c & (o_v < V)
    b_x = tl.load(p_logits + i_row * stride_logits + o_v, mask=m_v, other=-float("inf"))
    b_z, _ = transformed(b_x, p_bias, o_v, m_v, gain, cap, SOFTCAP)
    tl.store(p_candidates + i_row * n_candidates + o_c, b_z, mask=m_c)


def group_size(vocab: int, k: int) -> int:
    """Returns the power of two nearest to sqrt(V/k) from below, within bounds."""
    group = LEAST_GROUP
    while group < MOST_GROUP and (2 * group) ** 2 * k <= vocab:
        group *= 2
    return group


def scratch_entries(vocab: int, k: int) -> int:
    """Returns the float32 entries per row that a top-k takes beside the logits: maxima and candidates."""
    group = group_size(vocab, k)
    groups = triton.cdiv(vocab, group)
    return groups + min(k, groups) * group


def top_ids(
    logits: Tensor,
    bias: Tensor | None,
    head: tuple[float, float | None, float],
    maxima: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Returns ids (C, k) int64 and final logits, largest first, of raw projections (C, V) and the groups' maxima."""
    count, vocab = logits.shape
    group = group_size(vocab, k)
    chosen = maxima.topk(min(k, maxima.shape[1]), dim=1, sorted=False).indices
    candidates = logits.new_empty((count, chosen.shape[1] * group))
    factors = head_factors(head)
    with on_device(logits):
        candidates_kernel[(count, triton.cdiv(candidates.shape[1], CANDIDATES_PER_PROGRAM))](
            logits,
            bias,
            chosen,
            candidates,
            vocab,
            logits.stride(0),
            chosen.shape[1],
            candidates.shape[1],
            factors.gain,
            factors.cap,
            SOFTCAP=factors.softcap,
            GROUP=group,
            BC=CANDIDATES_PER_PROGRAM,
            num_warps=CANDIDATE_WARPS,
            enable_fp_fusion=FUSED_MULTIPLY_ADD,
        )
    best = candidates.topk(k, dim=1)
    ids = chosen.gather(1, torch.div(best.indices, group, rounding_mode="floor")) * group + best.indices % group
    # A row of -inf and NaN can select the padding of the last group.
    return ids.clamp_(max=vocab - 1), best.values
