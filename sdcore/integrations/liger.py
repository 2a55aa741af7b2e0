"""Computes Liger's `LigerFusedLinearJSDLoss` on our kernels, with the arguments of the class in liger-kernel 0.8.5.

    from sdcore.integrations.liger import LigerFusedLinearJSDLoss      # was: from liger_kernel.chunked_loss import ...

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5)
    loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels).backward()

With `n` the number of labels that are not `ignore_index`, at least 1, the value is

    weight_hard_loss · Σ cross_entropy(student, labels) / n + weight_soft_loss · Σ divergence(student, teacher) / n

where the temperature divides the logits of the divergence alone and `beta` is `alpha` of `sdkernels.linear_divergence`.

What differs from the obvious: liger-kernel is not imported. Sums, weight gradients and the softmax are in float32 or
better whatever the inputs; ignored rows are not computed and may hold anything; a head or states that need no gradient
get none; and what is returned besides the loss carries gradients. `docs/integrations/liger.md` has the list with
measurements.

Not covered: Liger's other distillation losses.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from sdkernels import LogitTransform, linear_divergence, linear_logprobs
from sdkernels.types import Backend, Gradient, Options
from sdkernels.validation import check_ids, check_number, check_options, check_tensor

from ..errors import ArgumentError


class LigerFusedLinearJSDLoss(nn.Module):
    """Adds up cross-entropy with the labels and Jensen-Shannon divergence from a teacher, without logits.

    Args:
        weight_hard_loss, weight_soft_loss: of the cross-entropy and of the divergence. A part of weight 0 is computed
            only if it is returned.
        beta: 0 KL(teacher‖student), 1 KL(student‖teacher), between them the generalised Jensen-Shannon divergence.
        ignore_index: rows with this label have no loss and count for nothing.
        temperature: divides both sides' logits in the divergence. No factor T² is applied.
        compiled: has no effect, since nothing is compiled.
        chunk_size: has no effect: `workspace_mb` says what memory may be used, whatever the number of rows.
        return_soft_hard_loss: return `(loss, soft_loss, hard_loss)`, the last two before their weights.
        backend, gradient, workspace_mb: as in `sdkernels.linear_divergence`.

    The options are attributes and may be set between calls. Raises `TypeError` and `ValueError` for bad ones.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        backend: Backend = "auto",
        gradient: Gradient = "auto",
        workspace_mb: float | None = None,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self.backend: Backend = backend
        self.gradient: Gradient = gradient
        self.workspace_mb = workspace_mb
        self._check_options()

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Takes states (N, H), (N, Ht), heads (V, H), (V, Ht) and labels (N,) int64 to a loss (), float32 or better.

        Both states may be (B, L, ·), with labels (B, L). A teacher's head may have more rows than the student's, for
        the same tokens and padding: what is beyond V is ignored. Nothing of the teacher gets a gradient. Raises
        `TypeError` and `ValueError`, before any work, for what does not fit.
        """
        self._check_options()
        student, teacher, labels = _rows(student_input, teacher_input, true_labels)
        check_tensor("student_input", student, (None, None))
        check_tensor("teacher_input", teacher, (student.shape[0], None), student)
        check_ids("true_labels", labels, (student.shape[0],), student)
        check_tensor("student_weight", student_weight, (None, student.shape[1]), student)
        check_tensor("teacher_weight", teacher_weight, (None, teacher.shape[1]), student)
        vocab = student_weight.shape[0]
        if teacher_weight.shape[0] < vocab:
            raise ArgumentError(
                f"teacher_weight must have a row for each of the student's V={vocab}, got {teacher_weight.shape[0]}"
            )
        active = labels != self.ignore_index  # (N,)
        count = active.sum().clamp(min=1)
        hard, soft = (torch.zeros((), dtype=torch.float32, device=student.device) for _ in range(2))
        if self.weight_soft_loss != 0 or self.return_soft_hard_loss:
            divergence = linear_divergence(
                student,
                student_weight,
                teacher,
                # None: one projection for both sides.
                None if teacher_weight is student_weight else teacher_weight[:vocab],
                alpha=self.beta,
                temperature=self.temperature,
                student_head=LogitTransform(bias=student_bias),
                teacher_head=LogitTransform(bias=None if teacher_bias is None else teacher_bias[:vocab]),
                token_weights=active.to(torch.float32),
                reduction="sum",
                backend=self.backend,
                gradient=self.gradient,
                workspace_mb=self.workspace_mb,
            )
            soft = divergence.loss / count
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            rows = active.nonzero()[:, 0]
            logprobs, _ = linear_logprobs(
                student[rows],
                student_weight,
                labels[rows],
                head=LogitTransform(bias=student_bias),
                backend=self.backend,
                workspace_mb=self.workspace_mb,
            )
            hard = -cast(Tensor, logprobs).sum() / count  # None only without targets
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft, hard) if self.return_soft_hard_loss else loss

    def extra_repr(self) -> str:
        return (
            f"weight_hard_loss={self.weight_hard_loss}, weight_soft_loss={self.weight_soft_loss}, beta={self.beta}, "
            f"ignore_index={self.ignore_index}, temperature={self.temperature}"
        )

    def _check_options(self) -> None:
        for name in ("weight_hard_loss", "weight_soft_loss"):
            check_number(name, getattr(self, name), -math.inf)
        check_number("beta", self.beta, 0.0, 1.0)
        options = Options(
            alpha=self.beta,
            temperature=self.temperature,
            backend=self.backend,
            gradient=self.gradient,
            workspace_mb=self.workspace_mb,
        )
        check_options(options)


def _rows(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens (B, L, ·) to (N, ·)."""
    if not (isinstance(student, Tensor) and student.dim() == 3):
        return student, teacher, labels
    shape = tuple(student.shape[:2])
    for name, tensor in (("teacher_input", teacher), ("true_labels", labels)):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape[:2]) != shape:
            came = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"{name} must begin with {shape} as student_input does, got {came}")
    return student.flatten(0, 1), teacher.flatten(0, 1), labels.reshape(-1)


__all__ = ["LigerFusedLinearJSDLoss"]
