"""Takes one step of self-distillation, from token ids to gradients. The file to read first.

The student sees `prompt + completion`. The teacher sees `prompt with privileged context + the same completion`. Both
give one hidden state per completion token, the divergence between the two next-token distributions is the loss, and
the gradient reaches the student only:

    plan = sdcore.prefix.plan(prompts, completions, teacher_prompts)      # which tokens have the same past
    for part in passes(model, plan, teacher=teacher).parts:               # hidden states of both, each token once
        out = loss(part.student_hidden, lm_head.weight, part.teachers[0].hidden)
        part.attach(out.loss).backward()

`checks` refuses what does not fit, `parts.run_parts` is this loop; `tilt_step` and `policy_gradient_step`, which learn
from rewards, are in `rewards`.

`linear_divergence` applies the output layer in small tiles, so the (N, V) logits never exist. The first completion
token is supervised too: the state that predicts it is the last prompt token's.

Not covered: sampling (`sdcore.prefix.generate`), the optimizer, and what becomes of the metrics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from sdkernels import TopKLogprobs

from ..losses import FusedLinearDivergence, PolicyTerm, TokenTilt
from ..prefix.choice import Strategy
from ..prefix.planner import Plan
from ..prefix.runner import passes
from ..prefix.verification import Verify
from ..teachers import Teacher, TrustRegion
from .checks import (
    checked_mixture,
    checked_rows,
    checked_scores,
    checked_tilt,
    checked_weights,
    require_teacher_prompts,
    scored_weights,
    total_of,
)
from .parts import MEANS, POLICY_MEANS, Backward, Divergence, StepOutput, run_parts


def distill_step(
    model: nn.Module,
    plan: Plan,
    *,
    loss: FusedLinearDivergence | None = None,
    teacher: Teacher | TrustRegion | TopKLogprobs | None = None,
    token_weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    micro_batch: int | None = None,
    max_tokens: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward | None = Tensor.backward,
    normalizer: float | None = None,
    policy: PolicyTerm | None = None,
    tilt: TokenTilt | None = None,
) -> StepOutput:
    """Teaches the model, on these completions, what the teacher says with the privileged context in view.

    Args:
        model: a transformers causal language model; may be wrapped by PEFT, DistributedDataParallel or FSDP2.
        plan: from `sdcore.prefix.plan` with the teacher's prompts, or `plan_trajectories` with views. A token that no
            view scores carries no loss, and the metric "loss/unscored_tokens" counts it.
        loss: None for reverse KL over the full vocabulary.
        teacher: whose weights; None for `Live()`, the model itself. `TopKLogprobs` of (N, K), in the order of
            `plan.target_ids`, for a teacher that has scored the completions already, such as a server
            (`integrations.servers`): then there is no teacher's pass, and the plan needs no teacher's prompts.
        token_weights: (N,), in the order of `plan.target_ids`; tokens of weight 0 carry no loss. None: all 1.
        old_logprobs: (N,) the sampler's log-probabilities, for a loss with an `importance_clip`.
        micro_batch: completions in flight at a time (strategy "two_phase"): bounds the memory. None: all, if they fit.
        max_tokens: tokens that are computed at a time: of several groups, or whole trees of trajectories, as many as
            fit go forward and backward before the next, and what is longer alone. None: all at a time.
        strategy, verify: as in `sdcore.prefix.run`.
        backward: called with a scalar for each part of the step, such as `accelerator.backward`. None: the loss comes
            back in the graph, for a trainer that goes backward itself; then all completions are in flight at a time.
        normalizer: what the weighted sum is divided by; None: the sum of the weights, which makes it their mean. See
            `losses.token_weights` for steps that are accumulated or spread over ranks.
        policy: a policy gradient in the same pass; its `distillation_weight` is the divergence's share of the loss.
            An anchor of it needs `reference_logprobs`.
        tilt: makes the sampled tokens more or less likely under the teacher, by their advantages. For a `loss` of
            `alpha` 0 or 1 over the full vocabulary, without clips.

    Accumulates gradients of the weighted mean. The model's own output layer is never called on completion tokens.
    Raises `ArgumentError` and `PlanError` for arguments that do not fit, and `UnsupportedModelError` for models that
    cannot be treated exactly, before any pass.
    """
    weights = checked_weights(plan, token_weights)
    old_logprobs = checked_rows("old_logprobs", plan, old_logprobs)
    scored: TopKLogprobs | None = None
    if isinstance(teacher, TopKLogprobs):
        scored, teacher, plan = checked_scores(plan, teacher), None, replace(plan, teachers=())
    else:
        require_teacher_prompts(plan)
        weights = scored_weights(plan, weights)
    loss = FusedLinearDivergence() if loss is None else loss
    loss.check(old_logprobs)
    tilt = None if tilt is None else checked_tilt(plan, tilt, loss, scored)
    policy = None if policy is None else checked_mixture(plan, policy)
    divergence = Divergence(
        loss=loss,
        weights=weights,
        total=total_of(plan, weights, normalizer),
        share=1.0 if policy is None else policy.distillation_weight,
        old_logprobs=old_logprobs,
        trust_share=teacher.share if isinstance(teacher, TrustRegion) else None,
        tilt=tilt,
        scored=scored,
    )
    planned = passes(
        model,
        plan,
        teacher=teacher,
        strategy=strategy,
        micro_batch=micro_batch,
        max_tokens=max_tokens,
        verify=verify,
        whole=backward is None,
        vocab_size=loss.options.vocab_size if tilt is None else None,
    )
    total, rows = run_parts(
        model,
        plan,
        planned,
        divergence=divergence,
        term=policy,
        term_share=1 - divergence.share,
        backward=backward,
    )
    metrics = rows.metrics(weights, MEANS)
    if rows.gradient_error is not None:
        metrics["loss/gradient_error"] = rows.gradient_error.max()
    if plan.scored is not None:
        metrics["loss/unscored_tokens"] = (~plan.scored).sum().float()
    if policy is not None:
        metrics |= rows.metrics(policy.token_weights, POLICY_MEANS) | {
            "loss/active_tokens": metrics["loss/active_tokens"],
            "loss/distillation": rows.by_name["per_token"].sum() / divergence.total,
            "loss/policy": rows.by_name["policy"].sum() / policy.total,
        }
    return StepOutput(total, metrics, planned.report, rows.by_name)


def imitate_step(
    model: nn.Module,
    plan: Plan,
    *,
    token_weights: Tensor | None = None,
    micro_batch: int | None = None,
    max_tokens: int | None = None,
    strategy: Strategy = "auto",
    verify: Verify = "once",
    backward: Backward | None = Tensor.backward,
    normalizer: float | None = None,
) -> StepOutput:
    """Takes a step of supervised fine-tuning, the baseline: cross-entropy, `-Σ w·log p(y) / normalizer`.

    Arguments are as in `distill_step`; a plan of the student's pass is enough, and teacher's prompts are not read.
    Accumulates gradients. Raises `ArgumentError` and `PlanError` before any pass.
    """
    weights = checked_weights(plan, token_weights)
    term = CrossEntropy(weights, total_of(plan, weights, normalizer))
    plan = replace(plan, teachers=())
    planned = passes(
        model,
        plan,
        strategy=strategy,
        micro_batch=micro_batch,
        max_tokens=max_tokens,
        verify=verify,
        whole=backward is None,
    )
    loss, rows = run_parts(model, plan, planned, term=term, backward=backward)
    return StepOutput(loss, rows.metrics(weights, MEANS), planned.report, rows.by_name)


class CrossEntropy(NamedTuple):
    """Is the term of imitation: how surprising each token is."""

    token_weights: Tensor | None  # (N,)
    total: float  # the weighted sum is divided by it
    temperature: float = 1.0

    def scalar(self, rows: Tensor | slice, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        surprise = -logprobs if self.token_weights is None else -logprobs * self.token_weights[rows]
        return surprise.sum() / self.total, {"per_token": surprise}
