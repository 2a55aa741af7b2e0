"""The public functions: check the arguments, say what is computed in scalars, call the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .driver import operators
from .driver.call import (
    choose_backend,
    machine_of,
    normalizer_of,
    objective_of,
    shards_of,
    teacher_transform,
    transform_scalars,
    without_bias,
    workspace_bytes_for,
)
from .types import (
    Backend,
    DivergenceOutput,
    Gradient,
    ImportanceClip,
    LogitTransform,
    Nonfinite,
    Objective,
    Reduction,
    TeacherMix,
    TopK,
    TopKLogprobs,
)
from .validation import check_call, check_head, check_linear, check_logits, check_row_operands, check_targets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch


class LogprobOutput(NamedTuple):
    """Result of `linear_logprobs`, both in the graph."""

    logprobs: Tensor | None  # (N,) log p(target) in nats; None without target_ids
    entropy: Tensor  # (N,) nats


class TopKOutput(NamedTuple):
    """Result of `linear_topk`, detached; most likely id first."""

    ids: Tensor  # (N, k) int64
    logprobs: Tensor  # (N, k) under the full vocabulary


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    alpha: float = 1.0,
    normalize: bool = False,
    temperature: float = 1.0,
    student_head: LogitTransform | None = None,
    teacher_head: LogitTransform | None = None,
    support: TopK | str | None = None,
    teacher: TeacherMix | TopKLogprobs | None = None,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    importance: ImportanceClip | None = None,
    entry_clip: float | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    gradient: Gradient = "auto",
    workspace_mb: float | None = None,
    on_nonfinite: Nonfinite = "propagate",
    process_group: ProcessGroup | None = None,
    normalizer_group: ProcessGroup | None = None,
) -> DivergenceOutput:
    """Divergence between two softmax heads without their logits ever existing as a whole.

    The same value and gradients as this, for `alpha=1` (reverse KL) and no option set::

        log_p = torch.log_softmax((student_hidden @ student_weight.T).float(), -1)
        log_q = torch.log_softmax((teacher_hidden @ teacher_weight.T).float(), -1).detach()
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    Args:
        student_hidden: (N, H), any floating dtype; the states that predict the N completion tokens.
        student_weight: (V, H), the lm_head.
        teacher_hidden: (N, Ht); None only with `teacher=TopKLogprobs(...)`. Never gets a gradient.
        teacher_weight: (V, Ht); None for the student's weight, detached, in one projection for both.
        alpha: 0 forward KL(q‖p), 1 reverse KL(p‖q), between them `alpha·KL(q‖m) + (1-alpha)·KL(p‖m)` with
            `m = (1-alpha)·p + alpha·q` (GKD, arXiv:2306.13649, eq. 1 and its `beta`). The ends are the two KLs, not
            the limits of the middle, which tends to 0 there.
        normalize: divide the middle by `alpha·(1-alpha)`, which makes it continuous with the ends.
        temperature: divides both sides' logits, unless a head has its own. No factor T² is applied.
        student_head, teacher_head: bias, scale, soft-cap, temperature of each side's logits. None for the teacher is
            the student's, without its bias where a `teacher_weight` is given.
        support: None for the full vocabulary; `TopK(k, of, tail)`; "sampled" for `sg(log p(y) - log q(y))·log p(y)`
            on `target_ids`, the score-function form of the reverse KL.
        teacher: `TeacherMix` blends a second teacher's logits in; `TopKLogprobs` stands for the teacher.
        token_weights: (N,) finite; rows with weight 0 are never projected and may hold anything.
        target_ids: (N,) int64; their log-probabilities under both sides come as by-products.
        importance: truncated importance weights of the sampled tokens (SDPO, arXiv:2601.20802).
        entry_clip: cap on each vocabulary entry's summand (OPSD, arXiv:2601.18734).
        vocab_size: columns from here on are padding and ignored on both sides.
        reduction: "mean" over the sum of weights, "sum", or "none" for (N,).
        backend: "triton" on a GPU, "native" on a CPU with a C compiler, "torch" anywhere; "auto" picks and
            `output.backend` says which.
        gradient: "in_forward" forms the gradients with the loss (4 matrix products in all), "recompute" in backward
            (6); "auto" recomputes only where the upstream gradient of each token must be known: `reduction="none"`
            with a head that is trained.
        workspace_mb: bound on everything beside inputs, outputs and gradients. None: 256, and with a trainable head
            on a GPU up to half the size of its float32 gradient.
        on_nonfinite: "propagate" lets NaN and inf through as plain PyTorch would; "raise" raises FloatingPointError.
        process_group: the ranks over whose vocabulary the heads are sharded (tensor parallel). Every rank gives the
            same rows and ids, ids of the whole vocabulary, and its own consecutive slice (V_r, ·) of each weight and
            bias, in the order of the ranks. Every rank gets the loss, the row values and the gradient of the hidden
            states whole, and the gradients of its slice. Not under torch.compile.
        normalizer_group: the ranks over which the rows of a mean are spread (data, sequence or context parallel). The
            loss is this rank's part of the mean over all of them: the parts add up to it. Not under torch.compile.

    Returns:
        `DivergenceOutput`; loss and row values are float32 (float64 if an input is). All rows without weight: loss 0,
        gradients 0.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what came and what was expected.
    """
    shards = shards_of(
        process_group,
        backend,
        {
            "student_weight": student_weight,
            "teacher_weight": teacher_weight,
            "teacher.weight": getattr(teacher, "weight", None),
            "student_head.bias": getattr(student_head, "bias", None),
            "teacher_head.bias": getattr(teacher_head, "bias", None),
        },
        {
            "student_hidden": student_hidden,
            "teacher_hidden": teacher_hidden,
            "teacher.hidden": getattr(teacher, "hidden", None),
            "token_weights": token_weights,
            "target_ids": target_ids,
            "importance.old_logprobs": getattr(importance, "old_logprobs", None),
            "teacher.ids": getattr(teacher, "ids", None),
            "teacher.logprobs": getattr(teacher, "logprobs", None),
        },
        *(alpha, normalize, temperature, support, entry_clip, vocab_size, reduction, gradient, workspace_mb),
        *(getattr(teacher, "share", None), getattr(importance, "clip", None), on_nonfinite, normalizer_group is None),
        *(without_bias(student_head), without_bias(teacher_head)),
    )
    whole_vocab = sum(shards) or None
    check_linear(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher, vocab_size, whole_vocab)
    rows, vocab = student_hidden.shape[0], vocab_size or whole_vocab or student_weight.shape[0]
    check_call(alpha, normalize, temperature, reduction, backend, gradient, workspace_mb, on_nonfinite)
    check_row_operands(
        rows,
        vocab,
        student_hidden,
        alpha=alpha,
        normalize=normalize,
        token_weights=token_weights,
        target_ids=target_ids,
        importance=importance,
        teacher=teacher,
        support=support,
        entry_clip=entry_clip,
    )
    student_head = LogitTransform() if student_head is None else student_head
    check_head("student_head", student_head, student_weight.shape[0], student_hidden)
    teacher_head = teacher_transform(student_head, teacher_head, teacher_weight)
    check_head("teacher_head", teacher_head, student_weight.shape[0], student_hidden)

    mix = teacher if isinstance(teacher, TeacherMix) else None
    cached = teacher if isinstance(teacher, TopKLogprobs) else None
    hidden, weight, bias = _autocast(student_hidden), _autocast(student_weight), student_head.bias
    sides = (teacher_hidden, teacher_weight, None if mix is None else mix.hidden, None if mix is None else mix.weight)
    teacher_hidden, teacher_weight, mix_hidden, mix_weight = (
        None if side is None else _autocast(side.detach()) for side in sides
    )
    objective = objective_of(
        alpha, normalize, temperature, student_head, teacher_head, support, teacher, importance, entry_clip
    )
    gradients = _formed_in_forward(hidden, weight, bias, reduction, gradient)
    machine = machine_of(
        process_group,
        shards,
        choose_backend(backend, hidden, weight, teacher_hidden, teacher_weight, buckets=objective.topk),
        workspace_mb,
        weight,
    )
    normalizer = normalizer_of(normalizer_group, reduction, hidden, token_weights)
    loss, *values = operators.divergence(
        hidden,
        weight,
        bias,
        teacher_hidden,
        teacher_weight,
        _detached(teacher_head.bias),
        mix_hidden,
        mix_weight,
        _detached(token_weights),
        _int64(target_ids),
        None if importance is None else importance.old_logprobs.detach(),
        None if cached is None else _int64(cached.ids),
        None if cached is None else cached.logprobs.detach(),
        *objective.for_vocabulary(vocab_size).encode(),
        reduction,
        gradients,
        normalizer,
        *machine,
        on_nonfinite == "raise",
    )
    return _output(loss, values, machine.backend, target_ids is not None, cached is not None)


def logit_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    alpha: float = 1.0,
    normalize: bool = False,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    support: TopK | str | None = None,
    teacher: TopKLogprobs | None = None,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    importance: ImportanceClip | None = None,
    entry_clip: float | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    workspace_mb: float | None = None,
    on_nonfinite: Nonfinite = "propagate",
) -> DivergenceOutput:
    """`linear_divergence` for those who have logits (N, V) already: the same options, values and errors.

    The gradient (N, V) is formed in backward, so that forward holds a workspace and nothing of the logits' size.
    `teacher_temperature` None is `temperature`.
    """
    check_logits(student_logits, teacher_logits, teacher, vocab_size)
    check_call(alpha, normalize, temperature, reduction, backend, "auto", workspace_mb, on_nonfinite)
    check_row_operands(
        student_logits.shape[0],
        student_logits.shape[1] if vocab_size is None else vocab_size,
        student_logits,
        alpha=alpha,
        normalize=normalize,
        token_weights=token_weights,
        target_ids=target_ids,
        importance=importance,
        teacher=teacher,
        support=support,
        entry_clip=entry_clip,
    )
    teacher_head = LogitTransform(temperature=teacher_temperature)
    check_head("teacher_head", teacher_head, student_logits.shape[1], student_logits)
    objective = objective_of(
        alpha, normalize, temperature, LogitTransform(), teacher_head, support, teacher, importance, entry_clip
    )
    chosen = choose_backend(backend, student_logits, teacher_logits, buckets=objective.topk)
    loss, *values = operators.logit_divergence(
        student_logits,
        None,
        None,
        _detached(teacher_logits),
        *[None] * 4,
        _detached(token_weights),
        _int64(target_ids),
        None if importance is None else importance.old_logprobs.detach(),
        None if teacher is None else _int64(teacher.ids),
        None if teacher is None else teacher.logprobs.detach(),
        *objective.for_vocabulary(vocab_size).encode(),
        reduction,
        chosen,
        workspace_bytes_for(workspace_mb, None),
        on_nonfinite == "raise",
    )
    return _output(loss, values, chosen, target_ids is not None, teacher is not None)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor | None = None,
    *,
    head: LogitTransform | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
    process_group: ProcessGroup | None = None,
) -> LogprobOutput:
    """Log-probabilities of given tokens and the entropy, with gradients and without the logits.

    Equal to this, for `head=None`::

        log_p = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
        logprobs, entropy = log_p.gather(1, target_ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    `hidden` (N, H), `weight` (V, H), `target_ids` (N,) int64 or None. Backward projects once more (4 matrix products
    in all). `process_group`, and what is raised, as in `linear_divergence`.
    """
    shards = shards_of(
        process_group,
        backend,
        {"weight": weight, "head.bias": getattr(head, "bias", None)},
        {"hidden": hidden, "target_ids": target_ids},
        *(temperature, vocab_size, workspace_mb, without_bias(head)),
    )
    head = LogitTransform() if head is None else head
    whole = sum(shards) or None
    check_targets(hidden, weight, target_ids, head, temperature, vocab_size, backend, workspace_mb, whole_vocab=whole)
    hidden, weight = _autocast(hidden), _autocast(weight)
    logprobs, entropy = operators.logprobs(
        hidden,
        weight,
        head.bias,
        *[None] * 6,
        _int64(target_ids),
        *[None] * 3,
        *Objective(student=transform_scalars(head, temperature)).for_vocabulary(vocab_size).encode(),
        *machine_of(process_group, shards, choose_backend(backend, hidden, weight), workspace_mb, weight),
    )
    return LogprobOutput(None if target_ids is None else logprobs, entropy)


@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    head: LogitTransform | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    backend: Backend = "auto",
    workspace_mb: float | None = None,
    process_group: ProcessGroup | None = None,
) -> TopKOutput:
    """The k most likely ids of each row and their log-probabilities, without gradient and without the logits.

    Equal to `torch.log_softmax((hidden @ weight.T).float() / temperature, -1).topk(k)`; what a teacher has to send in
    order to be a `TopKLogprobs` elsewhere. `process_group`, and what is raised, as in `linear_divergence`.
    """
    shards = shards_of(
        process_group,
        backend,
        {"weight": weight, "head.bias": getattr(head, "bias", None)},
        {"hidden": hidden},
        *(k, temperature, vocab_size, workspace_mb, without_bias(head)),
    )
    head = LogitTransform() if head is None else head
    whole = sum(shards) or None
    check_targets(hidden, weight, None, head, temperature, vocab_size, backend, workspace_mb, k=k, whole_vocab=whole)
    hidden, weight = _autocast(hidden), _autocast(weight)
    ids, logprobs = operators.topk(
        hidden,
        weight,
        head.bias,
        *[None] * 10,
        *Objective(student=transform_scalars(head, temperature), topk=k).for_vocabulary(vocab_size).encode(),
        *machine_of(process_group, shards, choose_backend(backend, hidden, weight, buckets=k), workspace_mb, weight),
    )
    return TopKOutput(ids, logprobs)


def _output(loss: Tensor, values: list[Tensor], backend: str, targets: bool, cached: bool) -> DivergenceOutput:
    per_token, student_logprobs, teacher_logprobs, student_entropy, teacher_entropy, active_tokens, *_ = values
    return DivergenceOutput(
        loss=loss,
        per_token=loss if loss.dim() else per_token,
        student_logprobs=student_logprobs if targets else None,
        teacher_logprobs=teacher_logprobs if targets and not cached else None,
        student_entropy=student_entropy,
        teacher_entropy=None if cached else teacher_entropy,
        active_tokens=active_tokens,
        backend=backend,
    )


def _formed_in_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: str, gradient: str) -> str:
    """Letters of the gradients that the forward pass forms; "" where none is needed or backward does it."""
    head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head or hidden.requires_grad):
        return ""
    if reduction == "none" and head:
        if gradient == "in_forward":
            raise ValueError(
                "gradient must be 'auto' or 'recompute' for reduction='none' with a head that is trained (its gradient "
                "depends on each token's upstream gradient), got 'in_forward'"
            )
        return ""
    if gradient == "recompute":
        return ""
    trained = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    return "".join(letter for letter, is_trained in zip("hwb", trained, strict=True) if is_trained)


def _autocast(tensor: Tensor) -> Tensor:
    """What autocast would do to the operands of a linear layer."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _int64(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.to(torch.int64)
