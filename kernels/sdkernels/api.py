"""The public functions: resolve the arguments, check them, compute by an operator, wrap what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from .driver import operators
from .driver.call import DIVERGENCE_NAMES, HEAD_NAMES, heads_of, objective_of, setting_of, shards_of
from .reference_call import divergence_by_definition
from .types import (
    Backend,
    DivergenceOutput,
    Gradient,
    ImportanceClip,
    LogitTransform,
    Nonfinite,
    Operands,
    Options,
    Reduction,
    TeacherMix,
    TopK,
    TopKLogprobs,
)
from .validation import check_head_call, check_linear_divergence, check_logit_divergence, check_reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch


class LogprobOutput(NamedTuple):
    """What `linear_logprobs` returns, both in the graph."""

    logprobs: Tensor | None  # (N,) log p(target) in nats; None without target_ids
    entropy: Tensor  # (N,) nats


class TopKOutput(NamedTuple):
    """What `linear_topk` returns, detached; most likely id first."""

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
    backend: Backend | Literal["reference"] = "auto",
    gradient: Gradient = "auto",
    gradient_tolerance: float | None = None,
    workspace_mb: float | None = None,
    on_nonfinite: Nonfinite = "propagate",
    process_group: ProcessGroup | None = None,
    normalizer_group: ProcessGroup | None = None,
) -> DivergenceOutput:
    """Returns the divergence between two softmax heads without their logits ever existing as a whole.

    The same value and gradients as this, for `alpha=1` (reverse KL) and no option set::

        log_p = torch.log_softmax((student_hidden @ student_weight.T).float(), -1)
        log_q = torch.log_softmax((teacher_hidden @ teacher_weight.T).float(), -1).detach()
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    What the loss is for any `alpha` and option is defined in `sdkernels.reference`, in float64 and textbook formulas:
    `divergence(log_p, log_q, alpha)` there answers "what is the loss at alpha 0.5?", and `backend="reference"` runs it,
    for whoever wants to step through it or to check another backend.

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
        vocab_size: columns from here on are padding and ignored on both sides, whose heads may then have different
            numbers of rows (151,936 and 152,064 of Qwen's), but not with a `process_group`.
        reduction: "mean" over the sum of weights, "sum", or "none" for (N,).
        backend: "triton" on a GPU, "native" on a CPU with a C compiler, "torch" anywhere; "auto" picks and
            `output.backend` says which. "reference" is the definition itself: float64 inside, gradients through
            autograd, all logits at once, so at most 2²³ of them (N·V), and with none of the options about how a call is
            run (`gradient`, `gradient_tolerance`, `workspace_mb`, `on_nonfinite`, `process_group`, `normalizer_group`).
        gradient: "in_forward" forms the gradients with the loss (4 matrix products in all), "recompute" in backward
            (6); "auto" recomputes only where the upstream gradient of each token must be known: `reduction="none"`
            with a head that is trained. Gradients of float16 that were formed in forward wait for backward in float32,
            where a loss scale multiplies them before they are rounded: four bytes an entry of the head instead of two.
        gradient_tolerance: relative error, by Frobenius norm, that the gradients of hidden states and of head may have,
            each, such as 4e-3; None for none. Then only the columns of the vocabulary that matter are multiplied, and
            `output.gradient_error` says how large the error is estimated to be; where it would be above the tolerance
            more columns are, in the end all. Faster on trained models, where rounding to bfloat16 makes as much.
            The gradients have to be formed in forward.
        workspace_mb: bound on everything beside inputs, outputs and gradients. None: 256; on a GPU 1536, or 4 % of its
            memory where that is less.
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
    options = Options(
        alpha=alpha,
        normalize=normalize,
        temperature=temperature,
        student_head=student_head,
        teacher_head=teacher_head,
        support=support,
        teacher=teacher,
        importance=importance,
        entry_clip=entry_clip,
        vocab_size=vocab_size,
        reduction=reduction,
        backend=backend,
        gradient=gradient,
        gradient_tolerance=gradient_tolerance,
        workspace_mb=workspace_mb,
        on_nonfinite=on_nonfinite,
    )
    sides = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    given = _operands(options, *sides, token_weights, target_ids)
    shards = shards_of(process_group, given, options, normalizer_group is None, names=DIVERGENCE_NAMES)
    check_linear_divergence(given, options, sum(shards))
    if backend == "reference":
        check_reference(given, options, process_group, normalizer_group)
        return _output(divergence_by_definition(given, options), backend, given)
    operands, objective = _ready(given, options), objective_of(options, teacher_weight)
    setting = setting_of(operands, options, objective.topk, process_group, shards, normalizer_group)
    formed = _formed_in_forward(operands, options)
    values = operators.divergence(*operands, *objective.encode(), *setting, formed)
    return _output(values, setting.backend, given)


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
    """Does what `linear_divergence` does for logits (N, V) that exist already: the same options, values and errors.

    The gradient (N, V) is formed in backward, so that forward holds a workspace and nothing of the logits' size.
    `teacher_temperature` None is `temperature`.
    """
    options = Options(
        alpha=alpha,
        normalize=normalize,
        temperature=temperature,
        teacher_head=LogitTransform(temperature=teacher_temperature),
        support=support,
        teacher=teacher,
        importance=importance,
        entry_clip=entry_clip,
        vocab_size=vocab_size,
        reduction=reduction,
        backend=backend,
        workspace_mb=workspace_mb,
        on_nonfinite=on_nonfinite,
    )
    given = _operands(options, student_logits, None, teacher_logits, None, token_weights, target_ids)
    check_logit_divergence(given, options)
    operands, objective = _ready(given, options), objective_of(options, None)
    setting = setting_of(operands, options, objective.topk)
    values = operators.divergence(*operands, *objective.encode(), *setting, "")
    return _output(values, setting.backend, given)


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
    """Returns log-probabilities of given tokens and the entropy, with gradients and without the logits.

    Equal to this, for `head=None`::

        log_p = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
        logprobs, entropy = log_p.gather(1, target_ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    `hidden` (N, H), `weight` (V, H), `target_ids` (N,) int64 or None. Backward projects once more (4 matrix products
    in all). `process_group`, and what is raised, as in `linear_divergence`.
    """
    options = Options(
        temperature=temperature, student_head=head, vocab_size=vocab_size, backend=backend, workspace_mb=workspace_mb
    )
    given = _operands(options, hidden, weight, target_ids=target_ids)
    shards = shards_of(process_group, given, options, names=HEAD_NAMES)
    check_head_call(given, options, sum(shards))
    operands, objective = _ready(given, options), objective_of(options, None)
    setting = setting_of(operands, options, 0, process_group, shards)
    logprobs, entropy = operators.logprobs(*operands, *objective.encode(), *setting, "")
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
    """Returns each row's k most likely ids and their log-probabilities, without gradient and without the logits.

    Equal to `torch.log_softmax((hidden @ weight.T).float() / temperature, -1).topk(k)`; what a teacher has to send in
    order to be a `TopKLogprobs` elsewhere. `process_group`, and what is raised, as in `linear_divergence`.
    """
    options = Options(
        temperature=temperature, student_head=head, vocab_size=vocab_size, backend=backend, workspace_mb=workspace_mb
    )
    given = _operands(options, hidden, weight)
    shards = shards_of(process_group, given, options, k, names=HEAD_NAMES)
    check_head_call(given, options, sum(shards), k)
    operands, objective = _ready(given, options), replace(objective_of(options, None), topk=k)
    setting = setting_of(operands, options, k, process_group, shards)
    return TopKOutput(*operators.topk(*operands, *objective.encode(), *setting, ""))


def _operands(
    options: Options,
    student_hidden: Tensor,
    student_weight: Tensor | None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
) -> Operands:
    """Returns the tensors of a call as they were given, before anything is known of them."""
    return Operands(
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=getattr(options.student_head, "bias", None),
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=getattr(options.teacher_head, "bias", None),
        mix_hidden=getattr(options.teacher, "hidden", None),
        mix_weight=getattr(options.teacher, "weight", None),
        token_weights=token_weights,
        target_ids=target_ids,
        old_logprobs=getattr(options.importance, "old_logprobs", None),
        teacher_ids=getattr(options.teacher, "ids", None),
        teacher_logprobs=getattr(options.teacher, "logprobs", None),
    )


def _ready(given: Operands, options: Options) -> Operands:
    """Returns checked tensors as an operator takes them: int64 ids, a graph on the student alone, autocast done."""

    def ready(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if name.endswith("_ids"):
            return tensor.to(torch.int64)
        if not name.startswith("student_"):
            tensor = tensor.detach()
        is_factor = name.endswith(("_hidden", "_weight")) and given.student_weight is not None
        return _autocast(tensor) if is_factor else tensor

    _, teacher_head = heads_of(options, given.teacher_weight)
    given = given._replace(teacher_bias=teacher_head.bias)
    return Operands(*(ready(name, tensor) for name, tensor in zip(Operands._fields, given, strict=True)))  # type: ignore[arg-type]


def _autocast(tensor: Tensor) -> Tensor:
    """Does what autocast would do to the operands of a linear layer."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _formed_in_forward(operands: Operands, options: Options) -> str:
    """Returns the letters of the gradients that the forward pass forms; "" where none is needed or backward does it."""
    student = (operands.student_hidden, operands.student_weight, operands.student_bias)
    hidden, weight, bias = (tensor is not None and tensor.requires_grad for tensor in student)
    per_token = options.reduction == "none" and (weight or bias)
    if not torch.is_grad_enabled() or per_token or options.gradient == "recompute":
        return ""
    return "h" * hidden + "w" * weight + "b" * bias


def _output(values: Sequence[Any], backend: str, given: Operands) -> DivergenceOutput:
    loss, per_token, student_logprobs, teacher_logprobs, student_entropy, teacher_entropy, active_tokens, error, *_ = (
        values
    )
    targets, cached = given.target_ids is not None, given.teacher_ids is not None
    return DivergenceOutput(
        loss=loss,
        per_token=loss if loss.dim() else per_token,
        student_logprobs=student_logprobs if targets else None,
        teacher_logprobs=teacher_logprobs if targets and not cached else None,
        student_entropy=student_entropy,
        teacher_entropy=None if cached else teacher_entropy,
        active_tokens=active_tokens,
        gradient_error=error if error.numel() else None,
        backend=backend,
    )
