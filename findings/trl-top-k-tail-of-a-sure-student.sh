#!/usr/bin/env bash
# TRL's top-k self-distillation loss has no gradient where the student is surest and most wrong.
#
# trl 1.16.0, `trl.experimental.sdpo.loss_utils.compute_topk_self_distillation_loss` with `distillation_add_tail=True`. The rest of
# the vocabulary is one more bucket, and its log-probability is found from that of the top-k, which is clamped to at most -1e-7.
# Once the student's top-k holds more than 1 - 1e-7 of its probability, the bucket is a constant: for a teacher that is sure of a token
# outside it, the loss stays at 16.1 nats and the gradient of the logits is gone. In float64, without the clamp, it is 1.
#
# Seen (float32, V=1000, k=20, forward KL, logits in [0, 1) but for one token each that is `gap` higher): norm of the gradient 1.00 up to
# a gap of 20, below 1e-7 from 22 on, where exactly it is 1.00 throughout.
# Exit status 1 where that has changed.
set -euo pipefail
here="$(mktemp -d)" && trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cd "$here" && TRL_EXPERIMENTAL_SILENCE=1 "$here/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import Tensor
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

V, K, STUDENT, TEACHER = 1000, 20, 3, 700


def exact(student: Tensor, teacher: Tensor) -> Tensor:
    """Is KL(teacher‖student) over the student's top-k and the rest, summed directly."""
    top = student.topk(K).indices
    rest = torch.ones(V, dtype=torch.bool)
    rest[top] = False
    p, q = (
        torch.cat([log[top], log[rest].logsumexp(0)[None]]) for log in (student.log_softmax(0), teacher.log_softmax(0))
    )
    return (q.exp() * (q - p)).sum()


def gradient(gap: float, by_trl: bool) -> tuple[float, float]:
    """Returns the loss and the norm of the gradient of the student's logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(V, generator=generator) for _ in range(2))
    student[STUDENT] += gap
    teacher[TEACHER] += gap
    if by_trl:
        options = {"distillation_topk": K, "distillation_alpha": 0.0, "distillation_add_tail": True}
        leaf = student.requires_grad_()
        loss = compute_topk_self_distillation_loss(leaf[None, None], teacher[None, None], **options).sum()
    else:
        leaf = student.double().requires_grad_()
        loss = exact(leaf, teacher.double())
    loss.backward()
    return float(loss.detach()), float(leaf.grad.norm())


as_seen = True
for gap in (15.0, 20.0, 22.0, 26.0):
    (loss, norm), (true_loss, true_norm) = gradient(gap, True), gradient(gap, False)
    print(f"gap {gap:g}: loss {loss:.2f} (exactly {true_loss:.2f}), norm of the gradient {norm:.1e} (exactly {true_norm:.2f})")
    as_seen &= abs(true_norm - 1) < 0.01 and (abs(norm - 1) < 0.05 if gap <= 20 else norm < 1e-7)
sys.exit(0 if as_seen else 1)
PYTHON
