"""Says what a call computes, as scalars, and how it is run: backend, workspace, and the ranks that share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tile.tiling import DEFAULT_WORKSPACE_MB, GPU_WORKSPACE_MB, GPU_WORKSPACE_SHARE, MIB
from ..tile.tuned import table_for
from ..types import LogitTransform, Objective, Operands, Options, Setting, TeacherMix, TopK, TopKLogprobs
from ..vocab_parallel.agreement import agree, check_group, normalizer_over
from .backends import choose_backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch

# The operands whose first dimension is this rank's slice of the vocabulary, the head first.
SHARDED = ("student_weight", "teacher_weight", "mix_weight", "student_bias", "teacher_bias")
COMMON = tuple(name for name in Operands._fields if name not in SHARDED)
# What a caller knows an operand by, where that is not its field's name.
DIVERGENCE_NAMES = {
    "student_bias": "student_head.bias",
    "teacher_bias": "teacher_head.bias",
    "mix_hidden": "teacher.hidden",
    "mix_weight": "teacher.weight",
    "old_logprobs": "importance.old_logprobs",
    "teacher_ids": "teacher.ids",
    "teacher_logprobs": "teacher.logprobs",
}
HEAD_NAMES = {"student_hidden": "hidden", "student_weight": "weight", "student_bias": "head.bias"}


def objective_of(options: Options, teacher_weight: Tensor | None) -> Objective:
    """Returns what a checked call computes; TopKLogprobs alone means a top-k support with a tail."""
    support, teacher, importance = options.support, options.teacher, options.importance
    if isinstance(teacher, TopKLogprobs) and support is None:
        support = TopK(teacher.ids.shape[1], of="teacher")
    restricted = support if isinstance(support, TopK) else None
    student_head, teacher_head = heads_of(options, teacher_weight)
    return Objective(
        alpha=float(options.alpha),
        normalize=options.normalize,
        support="topk" if restricted is not None else "full" if support is None else "sampled",
        topk=0 if restricted is None else restricted.k,
        topk_of="student" if restricted is None else restricted.of,
        tail=restricted is None or restricted.tail,
        entry_clip=None if options.entry_clip is None else float(options.entry_clip),
        importance_clip=math.inf if importance is None else float(importance.clip),
        mix_share=float(teacher.share) if isinstance(teacher, TeacherMix) else 0.0,
        student=transform_scalars(student_head, options.temperature),
        teacher=transform_scalars(teacher_head, options.temperature),
        vocab_size=options.vocab_size or 0,
    )


def heads_of(options: Options, teacher_weight: Tensor | None) -> tuple[LogitTransform, LogitTransform]:
    """Returns both sides' transforms; the teacher's is the student's, without its bias beside a head of its own."""
    student = options.student_head or LogitTransform()
    if options.teacher_head is not None:
        return student, options.teacher_head
    return student, student if teacher_weight is None else replace(student, bias=None)


def transform_scalars(head: LogitTransform, temperature: float) -> tuple[float, float | None, float]:
    """Returns (scale, softcap, temperature) of a head, whose own temperature wins over the call's."""
    own = temperature if head.temperature is None else head.temperature
    return float(head.scale), None if head.softcap is None else float(head.softcap), float(own)


def setting_of(
    operands: Operands,
    options: Options,
    buckets: int,
    process_group: ProcessGroup | None = None,
    shards: Sequence[int] = (),
    normalizer_group: ProcessGroup | None = None,
) -> Setting:
    """Returns how a checked call is run; `shards` are those of the process group, `buckets` the size of a top-k."""
    weight = operands.student_weight
    sides = (operands.student_hidden, weight, operands.teacher_hidden, operands.teacher_weight)
    backend = choose_backend(options.backend, *sides, buckets=buckets)
    return Setting(
        backend=backend if process_group is None else "torch",
        # Of the largest slice, so that the chunks of all ranks have as many rows.
        workspace_bytes=workspace_bytes_for(options.workspace_mb, weight, max(shards, default=None)),
        process_group="" if process_group is None else process_group.group_name,
        shards=shards,
        reduction=options.reduction,
        normalizer=_normalizer(normalizer_group, operands, options.reduction),
        raise_on_nonfinite=options.on_nonfinite == "raise",
        gradient_tolerance=options.gradient_tolerance or 0.0,
    )


def shards_of(
    process_group: ProcessGroup | None, given: Operands, options: Options, *more: Any, names: Mapping[str, str]
) -> list[int]:
    """Returns how many rows of the head each rank has; [] without a group.

    Refuses ranks that do not agree on the call. `more` is what they must have in common beside its operands and
    options, `names` what the caller knows the operands by.
    """
    if process_group is None:
        return []
    check_group("process_group", process_group)
    if options.backend not in ("auto", "torch"):
        raise ValueError(
            "backend must be 'auto' or 'torch' with a process_group: other kernels need the whole vocabulary; "
            f"got {options.backend!r}"
        )
    tensors: dict[str, object] = {names.get(name, name): getattr(given, name) for name in SHARDED + COMMON}
    sharded = tuple(names.get(name, name) for name in SHARDED)
    return agree(process_group, tensors, sharded, (*more, *_scalars(options), torch.is_grad_enabled()))


def _scalars(options: Options) -> list[Any]:
    """Returns what the ranks of a group must have in common: all options but the backend, without their tensors."""
    without = {
        "student_head": _without_bias(options.student_head),
        "teacher_head": _without_bias(options.teacher_head),
        "teacher": getattr(options.teacher, "share", None),
        "importance": getattr(options.importance, "clip", None),
        "backend": None,
    }
    return list((vars(options) | without).values())


def _without_bias(head: LogitTransform | None) -> LogitTransform | None:
    return replace(head, bias=None) if isinstance(head, LogitTransform) else head


def _normalizer(group: ProcessGroup | None, operands: Operands, reduction: str) -> float:
    """Returns what the mean of all ranks of the group divides by; 0 without a group, to be found in the pass."""
    if group is None:
        return 0.0
    check_group("normalizer_group", group)
    if reduction != "mean":
        raise ValueError(f"normalizer_group is for reduction='mean', got reduction={reduction!r}")
    hidden = operands.student_hidden
    return normalizer_over(group, hidden.shape[0], operands.token_weights, hidden.device)


def workspace_bytes_for(workspace_mb: float | None, weight: Tensor | None, vocab: int | None = None) -> int:
    """Returns the bound on a call's workspace; `vocab` is the size of the largest slice of a sharded head."""
    if workspace_mb is not None:
        return int(workspace_mb * MIB)
    if weight is None or weight.device.type == "cpu":
        return DEFAULT_WORKSPACE_MB * MIB
    measured = table_for(weight.device) if weight.requires_grad else None
    megabytes = None
    if measured is not None:
        megabytes = measured.workspace_mb(weight.shape[0] if vocab is None else vocab, weight.shape[1])
    if megabytes is not None:
        return megabytes * MIB
    if weight.device.type != "cuda":
        return DEFAULT_WORKSPACE_MB * MIB
    return min(GPU_WORKSPACE_MB * MIB, int(GPU_WORKSPACE_SHARE * _memory_of(weight.device)))


@torch.compiler.assume_constant_result
def _memory_of(device: torch.device) -> int:
    """Returns a GPU's whole memory in bytes: what is free of it differs between ranks and steps."""
    return torch.cuda.get_device_properties(device).total_memory
