"""Computes distillation losses of verl's batches: from hidden states, and lasgroup/SDPO's from log-probabilities.

    loss, metrics = distillation_loss(states, lm_head.weight, responses, response_mask, teacher=..., input_ids=ids)
    loss, _ = compute_self_distillation_loss(log_probs, teacher_log_probs, response_mask, config, ...)

What differs from the obvious: weights, masks and normalizers are known before the loss is, so they go in as weights of
the tokens, and the gradient is formed with the loss. A token's loss is that of `linear_divergence` or
`logit_divergence`: k log-probabilities and what remains are a softmax of k + 1 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdkernels import LogitTransform, TopK, TopKLogprobs, logit_divergence
from sdkernels.tile.topk import with_tail
from sdkernels.types import in_float64

from ...errors import ArgumentError
from ...losses import FusedLinearDivergence, policy_loss
from .layout import Hidden, Responses, Scored, flat, loss_weights


def distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    responses: Responses,
    response_mask: Tensor,
    *,
    teacher: Scored | Hidden,
    input_ids: Tensor,
    loss: FusedLinearDivergence | None = None,
    student_head: LogitTransform | None = None,
    old_log_probs: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
    norm_counts_sequences: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the loss () in the graph and its metrics, as verl's `distillation_loss` does, without any logits.

    Args:
        student_hidden: (total, H), (1, total, H) or (B, L, H), the last states of the whole batch.
        student_weight: (V, H), the lm_head.
        responses: where the responses are among those rows.
        response_mask: (B, T) or nested (B, j): which response tokens carry a loss.
        teacher: `Scored` for log-probabilities of a rollout server, `Hidden` for states.
        input_ids: the ids of the batch, nested, (1, total), (total,) or (B, L).
        loss: None for forward KL, which on `Scored` is `forward_kl_topk` with a tail. Its `temperature` is verl's.
        student_head: bias, scale, soft-cap of the logits.
        old_log_probs: (B, T) or nested, for a loss with an `importance_clip`.
        rollout_is_weights: (B, T) or nested; multiply the tokens' losses.
        loss_agg_mode, and what follows: as in `loss_weights`.

    Raises `ArgumentError`, and what `linear_divergence` raises, before any work.
    """
    loss = FusedLinearDivergence(alpha=0.0) if loss is None else loss
    mask = responses.take("response_mask", response_mask).bool()
    weights = loss_weights(
        loss_agg_mode,
        responses,
        mask,
        dp_size=dp_size,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
        norm_counts_sequences=norm_counts_sequences,
    )
    if rollout_is_weights is not None:
        weights = weights * responses.take("rollout_is_weights", rollout_is_weights)
    old = None if old_log_probs is None else responses.take("old_log_probs", old_log_probs)
    rows = responses.rows
    hidden = flat("student_hidden", student_hidden, 1)[rows]
    ids = flat("input_ids", input_ids, 0)
    scored = of_teacher = weight = None
    if isinstance(teacher, Hidden):
        if teacher.responses.lengths != responses.lengths:
            raise ArgumentError(
                f"teacher must have the student's responses, of lengths {list(responses.lengths)}, got "
                f"{list(teacher.responses.lengths)}"
            )
        of_teacher, weight = flat("teacher.states", teacher.states, 1)[teacher.responses.rows], teacher.weight
    else:
        scored = TopKLogprobs(*(flat("teacher", tensor, 1)[rows] for tensor in teacher))
        scored = TopKLogprobs(scored.ids.long(), scored.logprobs)
    out = loss(
        hidden,
        student_weight,
        of_teacher,
        weight,
        student_head=student_head,
        teacher=scored,
        token_weights=weights,
        target_ids=ids[rows + 1],
        old_logprobs=old,
        reduction="sum",
    )
    active = weights != 0
    per_token = out.per_token[active] / weights[active]
    metrics = {"distillation/active_tokens": float(active.sum())}
    if per_token.numel():
        metrics |= {"distillation/loss_min": float(per_token.min()), "distillation/loss_max": float(per_token.max())}
        if scored is not None:
            metrics["distillation/teacher_mass"] = float(scored.logprobs[active].exp().sum(-1).mean())
    return out.loss, metrics


def compute_self_distillation_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    response_mask: Tensor,
    self_distillation_config: Any,
    old_log_probs: Tensor | None = None,
    student_all_log_probs: Tensor | None = None,
    teacher_all_log_probs: Tensor | None = None,
    student_topk_log_probs: Tensor | None = None,
    teacher_topk_log_probs: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Is lasgroup/SDPO's function: takes (B, T) and (B, T, K) or (B, T, V), returns (loss, {}).

    The log-probabilities exist already, so this saves the intermediate tensors of the loss; `self_distillation_loss`
    saves them too. `self_distillation_config` has alpha, full_logit_distillation, distillation_topk,
    distillation_add_tail and is_clip.
    """
    config = self_distillation_config
    batch, width = response_mask.shape
    responses = Responses(
        rows=torch.arange(batch * width, device=response_mask.device), lengths=(width,) * batch, width=width
    )
    mask = _masked(response_mask, self_distillation_mask).reshape(-1)
    weights = loss_weights(loss_agg_mode, responses, mask, norm_counts_sequences=False)
    if rollout_is_weights is not None:
        weights = weights * rollout_is_weights.reshape(-1)
    if config.is_clip is not None:
        if old_log_probs is None:
            raise ArgumentError(f"old_log_probs must be given for is_clip={config.is_clip}, got None")
        logprobs = student_log_probs.detach().reshape(-1)
        ratio = policy_loss(logprobs, torch.ones_like(logprobs), old_logprobs=old_log_probs.reshape(-1)).ratio
        weights = weights * ratio.clamp(max=config.is_clip)
    options: dict[str, Any] = {"alpha": float(config.alpha)}
    if not config.full_logit_distillation:
        # Two tokens, the sampled one and all the others.
        student, teacher = (_with_tail(chosen.unsqueeze(-1), True) for chosen in (student_log_probs, teacher_log_probs))
        options |= {
            "support": "sampled",
            "target_ids": mask.new_zeros(mask.shape, dtype=torch.int64, device=student.device),
        }
    elif config.distillation_topk is None:
        student, teacher = _both("all", student_all_log_probs, teacher_all_log_probs)
    else:
        pair = _both("topk", student_topk_log_probs, teacher_topk_log_probs)
        student, teacher = (_with_tail(top, bool(config.distillation_add_tail)) for top in pair)
    weights = weights.to(student.device)
    out = logit_divergence(
        student.flatten(0, 1), teacher.flatten(0, 1), token_weights=weights, reduction="sum", **options
    )
    # In two steps, as in `in_float64`: the gradient goes the same way back.
    return out.loss.to(student_log_probs.dtype).to(student_log_probs.device), {}


def self_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    responses: Responses,
    response_mask: Tensor,
    self_distillation_config: Any,
    *,
    teacher: Hidden,
    input_ids: Tensor,
    temperature: float = 1.0,
    old_log_probs: Tensor | None = None,
    self_distillation_mask: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    student_head: LogitTransform | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Computes `compute_self_distillation_loss` from hidden states: for a configuration the same loss, without logits.

    Arguments as in `distillation_loss`; `temperature` is the sampling temperature, by which that actor divides both
    sides' logits. `old_log_probs` of an on-policy batch are the current ones, detached, as there: give those.
    """
    config = self_distillation_config
    support: TopK | str | None = None
    if not config.full_logit_distillation:
        support = "sampled"
    elif config.distillation_topk is not None:
        support = TopK(int(config.distillation_topk), of="student", tail=bool(config.distillation_add_tail))
    loss = FusedLinearDivergence(
        alpha=float(config.alpha), support=support, importance_clip=config.is_clip, temperature=temperature
    )
    return distillation_loss(
        student_hidden,
        student_weight,
        responses,
        _masked(response_mask, self_distillation_mask),
        teacher=teacher,
        input_ids=input_ids,
        loss=loss,
        student_head=student_head,
        old_log_probs=old_log_probs if config.is_clip is not None else None,
        rollout_is_weights=rollout_is_weights,
        loss_agg_mode=loss_agg_mode,
        norm_counts_sequences=False,
    )


def _masked(response_mask: Tensor, self_distillation_mask: Tensor | None) -> Tensor:
    mask = response_mask.bool()
    return mask if self_distillation_mask is None else mask & self_distillation_mask.bool()[:, None]


def _with_tail(logprobs: Tensor, tail: bool) -> Tensor:
    """Takes (B, T, K) to (B, T, K + 1) or, renormalised, (B, T, K)."""
    rows = with_tail(in_float64(logprobs.flatten(0, 1)), None, tail)
    return rows.view(*logprobs.shape[:2], -1)


def _both(which: str, student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    if student is None or teacher is None:
        missing = "student" if student is None else "teacher"
        raise ArgumentError(f"{missing}_{which}_log_probs must be given for this configuration, got None")
    return student, teacher
