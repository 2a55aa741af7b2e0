"""Does the fused operations as passes over the rows: values, and the gradients that are asked for.

A pass is called once with the gradients that it can already form, or, where the upstream gradient has to be known
first, a second time from backward with that gradient per row. Which ones is said in letters: "h" the hidden states,
"w" the head, "b" its bias.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Gradients, Objective, Operands, Setting, Weighed
from ..vocab_parallel.shards import Shards
from .chunks import HeadGradients, HeadWalk, LogitGradient, LogitWalk, RowWalk
from .columns import ColumnGradients, scratch_bytes


class Values(NamedTuple):
    """Holds row values (N,), 0 in rows without weight; None where there is nothing to report."""

    per_token: Tensor  # divergence times token weight and importance
    student_logprobs: Tensor | None
    teacher_logprobs: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    active_tokens: int
    denominator: float  # what the sum over rows is divided by
    gradient_error: Tensor | None = None  # (2,) estimated, relative: of the gradients of hidden states and of head


def divergence_pass(
    operands: Operands,
    objective: Objective,
    setting: Setting,
    wanted: str,
    upstream: Tensor | None = None,
    weighed: Weighed | None = None,
) -> tuple[Values, Gradients]:
    """Returns values, and the wanted gradients of `Σ_i upstream_i · per_token_i / denominator` (upstream None: ones).

    Gradients that an upstream one is still to multiply are in `held_dtype`. Where the operands are logits, theirs is
    the gradient "h". `weighed` is what has been read of the weights already.
    """
    if operands.student_weight is not None:
        walk = _head_walk(operands, objective, setting, weighed)
        old = operands.old_logprobs
        importance = None if old is None else _importance(old.new_zeros(()), old, objective.importance_clip)
        bounds = (operands.token_weights, upstream, importance)
        tolerance = setting.gradient_tolerance
        if not (wanted and tolerance):
            gradients = HeadGradients(walk, wanted, held=upstream is None, bounds=bounds)
            values = _divergence_values(walk, gradients if wanted else None, setting, upstream)
            return values, gradients.result()
        some = ColumnGradients(walk, wanted, tolerance, held=upstream is None, bounds=bounds)
        values = _divergence_values(walk, some, setting, upstream)
        error = some.error
        if not bool((error > tolerance).any()):
            return values._replace(gradient_error=error), some.result()
        # Each chunk's was small: they have added up, and the chunks' gradients of the head have cancelled.
        del walk, some
        values, formed = divergence_pass(
            operands, objective, setting._replace(gradient_tolerance=0.0), wanted, upstream, weighed
        )
        return values._replace(gradient_error=torch.zeros_like(error)), formed
    logits = LogitWalk(operands, objective, setting.backend, setting.workspace_bytes, weighed)
    gradient = LogitGradient(logits) if wanted else None
    values = _divergence_values(logits, gradient, setting, upstream)
    return values, Gradients(None if gradient is None else gradient.logits, None, None)


def logprob_pass(
    operands: Operands,
    objective: Objective,
    setting: Setting,
    wanted: str,
    grad_logprobs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Gradients]:
    """Returns log-probabilities of `target_ids` and entropies, (N,) each, and gradients for upstream ones of either."""
    walk = _head_walk(operands, objective, setting)
    upstream = [gradient.abs() for gradient in (grad_logprobs, grad_entropy) if gradient is not None]
    gradients = HeadGradients(walk, wanted, bounds=[torch.stack(upstream).sum(0)] if upstream else ())
    logprobs = None if operands.target_ids is None else walk.per_row()
    entropy = walk.per_row()
    for rows in walk.chunks():
        logits, _ = walk.project(rows)
        tile_logprobs, entropy[rows], gradient = walk.backend.logprob_tile(
            logits,
            walk.tile_rows(rows),
            walk.objective,
            grad_logprobs=None if grad_logprobs is None else grad_logprobs[rows],
            grad_entropy=None if grad_entropy is None else grad_entropy[rows],
            gradient_dtype=walk.gradient_dtype,
        )
        if logprobs is not None:
            logprobs[rows] = tile_logprobs
        if gradient is not None:
            gradients.add(rows, gradient, None, 1.0)
    return logprobs, entropy, gradients.result()


def topk_pass(operands: Operands, objective: Objective, setting: Setting) -> tuple[Tensor, Tensor]:
    """Returns the `objective.topk` most likely ids of each row and their log-probabilities, (N, k) each."""
    walk = _head_walk(operands, objective, setting)
    hidden, k = operands.student_hidden, objective.topk
    ids = hidden.new_empty((hidden.shape[0], k), dtype=torch.int64)
    logprobs = hidden.new_empty((hidden.shape[0], k), dtype=walk.dtype)
    for rows in walk.chunks():
        logits, _ = walk.project(rows)
        ids[rows], logprobs[rows] = walk.backend.topk_tile(logits, walk.tile_rows(rows), walk.objective, k)
    return ids, logprobs


def _head_walk(operands: Operands, objective: Objective, setting: Setting, weighed: Weighed | None = None) -> HeadWalk:
    """Returns the walk over rows that a setting asks for."""
    shards = None
    if setting.process_group:
        shards = Shards(setting.process_group, setting.shards, objective.vocab_size or sum(setting.shards))
    vocab, width = operands.weight.shape
    more = scratch_bytes(vocab, width, operands.dtype.itemsize) if setting.gradient_tolerance else (0, 0)
    return HeadWalk(operands, objective, setting.backend, setting.workspace_bytes, shards, more, weighed)


def _divergence_values(
    walk: RowWalk, gradients: HeadGradients | LogitGradient | None, setting: Setting, upstream: Tensor | None
) -> Values:
    operands, objective = walk.operands, walk.objective
    denominator = setting.normalizer or _denominator(walk, setting.reduction)
    targets, cached = operands.target_ids is not None, operands.teacher_ids is not None
    per_token, student_entropy = walk.per_row(), walk.per_row()
    teacher_entropy = None if cached else walk.per_row()
    student_logprobs = walk.per_row() if targets else None
    teacher_logprobs = walk.per_row() if targets and not cached else None
    options = {"want_gradient": gradients is not None, "gradient_dtype": walk.gradient_dtype}
    for rows in walk.chunks():
        student, teacher = walk.project(rows)
        tile, gradient = walk.backend.divergence_tile(student, teacher, walk.tile_rows(rows), objective, **options)
        factors = walk.token_weights(rows)
        if operands.old_logprobs is not None:
            importance = _importance(tile.student_logprobs, operands.old_logprobs[rows], objective.importance_clip)
            factors = importance if factors is None else factors * importance
        per_token[rows] = tile.loss if factors is None else tile.loss * factors
        student_entropy[rows] = tile.student_entropy
        if teacher_entropy is not None:
            teacher_entropy[rows] = tile.teacher_entropy
        if student_logprobs is not None:
            student_logprobs[rows] = tile.student_logprobs
        if teacher_logprobs is not None:
            teacher_logprobs[rows] = tile.teacher_logprobs
        if gradients is not None:
            if upstream is not None:
                factors = upstream[rows] if factors is None else factors * upstream[rows]
            gradients.add(rows, gradient, factors, 1.0 / denominator)
    if setting.raise_on_nonfinite:
        _check_finite(per_token)
    return Values(
        per_token, student_logprobs, teacher_logprobs, student_entropy, teacher_entropy, walk.count, denominator
    )


def _denominator(walk: RowWalk, reduction: str) -> float:
    if reduction != "mean":
        return 1.0
    return (float(walk.count) if walk.weighed is None else walk.weighed.total) or 1.0


def _importance(logprobs: Tensor, old_logprobs: Tensor, clip: float) -> Tensor:
    return (logprobs - old_logprobs.to(logprobs.dtype)).clamp(max=math.log(clip)).exp()


def _check_finite(per_token: Tensor) -> None:
    rows = (~per_token.isfinite()).nonzero()[:, 0]
    if rows.numel():
        raise FloatingPointError(
            f"the divergence of {rows.numel()} rows is not finite, the first of them row {int(rows[0])}: "
            "student or teacher logits are not finite there"
        )
