"""One step of self-distillation, from token ids to gradients. The file to read first.

The student sees `prompt + completion`. The teacher sees `prompt with privileged context + the same completion`. Both
give one hidden state per completion token, the divergence between the two next-token distributions is the loss, and
the gradient reaches the student only:

    plan = sdcore.prefix.plan(prompts, completions, teacher_prompts)      # which tokens have the same past
    for part in passes(model, plan, teacher=teacher).parts:               # hidden states of both, each token once
        out = loss(part.student_hidden, lm_head.weight, part.teachers[0].hidden)
        part.attach(out.loss).backward()

`linear_divergence` applies the output layer in small tiles, so the (N, V) logits never exist. The first completion
token is supervised too: the state that predicts it is the last prompt token's.

Not covered: sampling (`sdcore.prefix.generate`), the optimizer, and what becomes of the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sdkernels import DivergenceOutput, TeacherMix, linear_logprobs

from .errors import ArgumentError
from .losses import FusedLinearDivergence
from .models import find_body, head_of
from .prefix.checks import Verify
from .prefix.planner import Plan, TokenIds
from .prefix.planner import plan as plan_of
from .prefix.report import Report
from .prefix.runner import Part, Strategy, passes, run
from .teachers import Teacher, TrustRegion

Backward = Callable[[Tensor], object]


class StepOutput(NamedTuple):
    """What a step reports; the gradients are already in the parameters' `.grad`."""

    loss: Tensor  # () detached: mean over the weights of the completion tokens
    metrics: dict[str, Tensor]  # () each, detached, not yet copied to the host
    report: Report


def distill_step(
    model: nn.Module,
    plan: Plan,
    *,
    loss: FusedLinearDivergence | None = None,
    teacher: Teacher | TrustRegion | None = None,
    token_weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    micro_batch: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward = Tensor.backward,
) -> StepOutput:
    """Teach the model, on these completions, what the teacher says with the privileged context in view.

    Args:
        model: a transformers causal language model; may be wrapped by PEFT, DistributedDataParallel or FSDP2.
        plan: from `sdcore.prefix.plan`, with the teacher's prompts.
        loss: None for reverse KL over the full vocabulary.
        teacher: whose weights; None for `Live()`, the model itself.
        token_weights: (N,), in the order of `plan.target_ids`; tokens of weight 0 carry no loss. None: all 1.
        old_logprobs: (N,) the sampler's log-probabilities, for a loss with an `importance_clip`.
        micro_batch: completions in flight at a time (strategy "two_phase"): bounds the memory. None: all, if they fit.
        strategy, verify: as in `sdcore.prefix.run`.
        backward: called with a scalar for each part of the step, such as `accelerator.backward`.

    Accumulates gradients of the mean over the weights. The model's own output layer is never called on completion
    tokens. Raises `ArgumentError` and `PlanError` for arguments that do not fit, and `UnsupportedModelError` for models
    that cannot be treated exactly, before any pass.
    """
    weights = _checked_weights(plan, token_weights)
    old_logprobs = _checked_rows("old_logprobs", plan, old_logprobs)
    if not plan.teacher:
        raise ArgumentError("plan must have teacher prompts, got a plan of the student's pass alone")
    loss = FusedLinearDivergence() if loss is None else loss
    loss.check(old_logprobs)
    share = teacher.share if isinstance(teacher, TrustRegion) else None
    total = float(plan.num_rows if weights is None else weights.sum()) or 1.0
    body = find_body(model)
    seen = _Seen(plan)
    parts, report = passes(model, plan, teacher=teacher, strategy=strategy, micro_batch=micro_batch, verify=verify)
    with closing(parts):
        for part in parts:
            # Anew for each part: under FSDP2 each gathers the head, and its backward frees what it gathered.
            head = head_of(body)
            first, mix = part.teachers[0], None
            if share is not None:
                mix = TeacherMix(part.teachers[1].hidden, head.weight.detach(), share)
            out = loss(
                part.student_hidden,
                head.weight,
                first.hidden,
                first.weight,
                student_head=head.transform,
                teacher_head=first.transform,
                teacher=mix,
                token_weights=None if weights is None else weights[part.rows],
                target_ids=plan.target_ids[part.rows],
                old_logprobs=None if old_logprobs is None else old_logprobs[part.rows],
                reduction="sum",
            )
            seen.add(part, out)
            with part.no_sync():
                backward(part.attach(out.loss / total))
    return StepOutput(seen.per_token.sum() / total, seen.metrics(weights), report)


def imitate_step(
    model: nn.Module,
    prompts_B: Sequence[TokenIds],
    completions_B: Sequence[TokenIds],
    *,
    backward: Backward = Tensor.backward,
) -> StepOutput:
    """Supervised fine-tuning, the baseline: cross-entropy of given completions, mean over their tokens.

    Accumulates gradients into the model's parameters. Raises `PlanError` for ids or lists that do not fit.
    """
    plan = plan_of(prompts_B, [[completion] for completion in completions_B])
    student_hidden, _, report = run(model, plan)
    head = head_of(model)
    logprobs, entropy = linear_logprobs(student_hidden, head.weight, plan.target_ids, head=head.transform)
    loss = -cast(Tensor, logprobs).mean()  # None only without targets
    backward(loss)
    return StepOutput(loss.detach(), {"student/entropy": entropy.detach().mean()}, report)


class _Seen:
    """Row values (N,) of the parts, put back in the plan's order."""

    def __init__(self, plan: Plan) -> None:
        self.device, self.count = plan.device, plan.num_rows
        self.values: dict[str, Tensor] = {}

    def add(self, part: Part, out: DivergenceOutput) -> None:
        for name in ("per_token", "student_entropy", "teacher_entropy", "student_logprobs", "teacher_logprobs"):
            rows = getattr(out, name)
            if rows is not None:
                whole = self.values.setdefault(name, rows.new_zeros(self.count))
                whole[part.rows] = rows.detach()

    @property
    def per_token(self) -> Tensor:
        return self.values["per_token"]

    def metrics(self, weights: Tensor | None) -> dict[str, Tensor]:
        active = (
            torch.tensor(float(self.count), device=self.device) if weights is None else (weights != 0).sum().float()
        )
        # Rows without weight are 0 in every value.
        means = {name: rows.sum() / active.clamp(min=1) for name, rows in self.values.items() if name != "per_token"}
        return {
            "student/entropy": means["student_entropy"],
            "teacher/entropy": means["teacher_entropy"],
            "student/logprob": means["student_logprobs"],
            "teacher/logprob": means["teacher_logprobs"],
            "loss/active_tokens": active,
        }


def _checked_weights(plan: Plan, token_weights: Tensor | None) -> Tensor | None:
    weights = _checked_rows("token_weights", plan, token_weights)
    if weights is not None and not bool(weights.isfinite().all() & ((weights.sum() > 0) | (weights == 0).all())):
        raise ArgumentError(
            f"token_weights must be finite, and all 0 or of a positive sum, got {float(weights.sum()):g}"
        )
    return weights


def _checked_rows(name: str, plan: Plan, rows: Tensor | None) -> Tensor | None:
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or rows.shape != (plan.num_rows,) or not rows.is_floating_point():
        came = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ArgumentError(f"{name} must be a float tensor of shape (N={plan.num_rows},), got {came}")
    return rows.to(plan.device)


__all__ = ["StepOutput", "distill_step", "imitate_step"]
