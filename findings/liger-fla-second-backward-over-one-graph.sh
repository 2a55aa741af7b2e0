#!/usr/bin/env bash
# A second backward pass over one graph is wrong in Liger's FusedLinearJSD and in flash-linear-attention's fused KL divergence.
#
# liger-kernel 0.8.5, flash-linear-attention 0.6.0, triton 3.7.1 in its interpreter. Both form the gradients in the forward pass and multiply
# them by the upstream gradient, in place, in the backward pass. With `retain_graph=True` (as a measurement of gradient norms per loss
# does) the second pass multiplies what the first has multiplied: upstream 0.5 gives 0.5 and then 0.25 of the gradient. Nothing is raised.
# With an upstream gradient of 1 nothing is to be seen.
#
# Seen: after two passes with upstream 0.5 the gradient of the hidden states is 0.75 of the sum of both.
# Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 triton==3.7.1 transformers==5.23.0 liger-kernel==0.8.5 \
    flash-linear-attention==0.6.0
cd "$here" && TRITON_INTERPRET=1 "$here/venv/bin/python" - <<'PYTHON'
import sys
from collections.abc import Callable

import torch
from fla.modules.fused_kl_div import fused_kl_div_loss
from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
from torch import Tensor

generator = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, TEACHER_HIDDEN, TEACHER_WEIGHT = (
    torch.randn(rows, 16, generator=generator) for rows in (8, 64, 8, 64)
)


def liger(hidden: Tensor, weight: Tensor) -> Tensor:
    return LigerFusedLinearJSD(jsd_beta=0.5)(hidden, weight, TEACHER_HIDDEN, TEACHER_WEIGHT, None)


def fla(hidden: Tensor, weight: Tensor) -> Tensor:
    return fused_kl_div_loss(hidden, TEACHER_HIDDEN, weight, TEACHER_WEIGHT)


def gradient(loss: Callable[[Tensor, Tensor], Tensor], upstreams: list[float]) -> Tensor:
    """Returns the gradient of the hidden states after a backward pass with each of these, over one graph."""
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    value = loss(hidden, weight)
    for upstream in upstreams:
        (upstream * value).backward(retain_graph=True)
    return hidden.grad


as_seen = True
for name, loss in (("liger-kernel", liger), ("flash-linear-attention", fla)):
    once = gradient(loss, [1.0])
    share = float((gradient(loss, [0.5, 0.5]) * once).sum() / (once * once).sum())
    print(f"{name}: two backward passes with upstream 0.5 give {share:.3f} of the gradient")
    as_seen &= abs(share - 0.75) < 0.01
sys.exit(0 if as_seen else 1)
PYTHON
