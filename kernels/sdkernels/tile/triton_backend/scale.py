"""Multiplies a gradient by one factor that lies on the GPU, in place, and touches nothing where that factor is 1.

A loss is nearly always the last thing before backward, so that its upstream gradient is 1, and a pass over the head's
gradient for nothing would be a hundredth of a step. The host does not know: to look would be to wait for the GPU. So
every program reads the factor, and ends there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import FUSED_MULTIPLY_ADD, on_device

BLOCK = 4096
WARPS = 8


@triton.jit
def scale_kernel(
    p_gradient,  # (n,), written where the factor is not 1
    p_factor,  # ()
    n,
    BLOCK: tl.constexpr,
):
    factor = tl.load(p_factor).to(tl.float32)
    # Also true of a NaN.
    if factor != 1.0:
        o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_n = o_n < n
        b_gradient = tl.load(p_gradient + o_n, mask=m_n, other=0.0).to(tl.float32) * factor
        tl.store(p_gradient + o_n, b_gradient.to(p_gradient.dtype.element_ty), mask=m_n)


def can_scale(gradient: Tensor, factor: Tensor) -> bool:
    """True where `scale_` may be called; else PyTorch multiplies."""
    return factor.dim() == 0 and factor.device == gradient.device and gradient.is_contiguous()


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a contiguous gradient, of at most 32 bits, by `factor` (): in float32, rounded once."""
    count = gradient.numel()
    if count:
        with on_device(gradient):
            scale_kernel[(triton.cdiv(count, BLOCK),)](
                gradient,
                factor,
                count,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=FUSED_MULTIPLY_ADD,
            )
    return gradient
