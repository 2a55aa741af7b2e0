"""What a call computes, as scalars, and how it is run: backend, workspace, and the groups of ranks that share it."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..tile.tiling import DEFAULT_WORKSPACE_MB, MIB
from ..tile.tuned import table_for
from ..types import ImportanceClip, LogitTransform, Objective, TeacherMix, TopK, TopKLogprobs
from ..vocab_parallel.agreement import agree, check_group, normalizer_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # not in every build of torch

# A top-k support of this size or more does not fit the registers of a Triton program.
TRITON_BUCKETS = 2048


class Machine(NamedTuple):
    """How an operator's pass over a head is run, in the order of its arguments; see `operators.MACHINE_SCHEMA`."""

    backend: str
    workspace_bytes: int
    process_group: str
    shards: list[int]


def choose_backend(backend: str, *tensors: Tensor | None, buckets: int = 0) -> str:
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device.type
    wide = any(tensor.dtype == torch.float64 for tensor in present)
    if backend == "auto":
        if wide:
            return "torch"
        if device == "cpu":
            return "native" if _can_compile() else "torch"
        fits = device == "cuda" and buckets < TRITON_BUCKETS
        return "triton" if fits and importlib.util.find_spec("triton") else "torch"
    if backend != "torch" and wide:
        raise TypeError(f"backend={backend!r} needs inputs of at most 32 bits, got torch.float64; use backend='torch'")
    if backend == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1), got {present[0].device}"
            )
        if not importlib.util.find_spec("triton"):
            raise ModuleNotFoundError("backend='triton' needs the triton package: pip install triton")
    if backend == "native":
        if device != "cpu":
            raise ValueError(f"backend='native' needs tensors on a CPU, got {present[0].device}")
        if not _can_compile():
            raise RuntimeError(
                "backend='native' needs a C compiler ($CC, or cc) and a folder for what it makes ($SDKERNELS_CACHE, or "
                "~/.cache/sdkernels); use backend='torch'"
            )
    return backend


@torch.compiler.assume_constant_result
def _can_compile() -> bool:
    from ..tile.native_backend import is_available

    return is_available()


def machine_of(
    process_group: ProcessGroup | None, shards: list[int], backend: str, workspace_mb: float | None, weight: Tensor
) -> Machine:
    if process_group is None:
        return Machine(backend, workspace_bytes_for(workspace_mb, weight), "", [])
    # Of the largest slice, so that the chunks of all ranks have as many rows.
    workspace_bytes = workspace_bytes_for(workspace_mb, weight, max(shards))
    return Machine("torch", workspace_bytes, process_group.group_name, shards)


def shards_of(
    process_group: ProcessGroup | None,
    backend: str,
    sharded: dict[str, object],
    common: dict[str, object],
    *options: Any,
) -> list[int]:
    """How many rows of the first of the `sharded` tensors each rank has; [] without a group."""
    if process_group is None:
        return []
    check_group("process_group", process_group)
    if backend in ("native", "triton"):
        raise ValueError(
            "backend must be 'auto' or 'torch' with a process_group: other kernels need the whole vocabulary; "
            f"got {backend!r}"
        )
    return agree(process_group, sharded | common, tuple(sharded), (*options, torch.is_grad_enabled()))


def without_bias(head: LogitTransform | None) -> LogitTransform | None:
    return replace(head, bias=None) if isinstance(head, LogitTransform) else head


def normalizer_of(group: ProcessGroup | None, reduction: str, hidden: Tensor, token_weights: Tensor | None) -> float:
    """What the mean of all ranks of the group divides by; 0 without a group, to be found in the pass."""
    if group is None:
        return 0.0
    check_group("normalizer_group", group)
    if reduction != "mean":
        raise ValueError(f"normalizer_group is for reduction='mean', got reduction={reduction!r}")
    return normalizer_over(group, hidden.shape[0], token_weights, hidden.device)


def workspace_bytes_for(workspace_mb: float | None, weight: Tensor | None, vocab: int | None = None) -> int:
    if workspace_mb is not None:
        return int(workspace_mb * MIB)
    default = DEFAULT_WORKSPACE_MB * MIB
    if weight is None or weight.device.type == "cpu" or not weight.requires_grad:
        return default
    rows = weight.shape[0] if vocab is None else vocab
    measured = table_for(weight.device)
    megabytes = None if measured is None else measured.workspace_mb(rows, weight.shape[1])
    if megabytes is not None:
        return megabytes * MIB
    # On a GPU each chunk of rows passes once over the float32 gradient of the head: larger chunks, fewer passes.
    return max(default, rows * weight.shape[1] * 2)


def teacher_transform(
    student: LogitTransform, teacher: LogitTransform | None, teacher_weight: Tensor | None
) -> LogitTransform:
    """The teacher's transform; None given, the student's, without its bias where the teacher has its own weight."""
    if teacher is not None:
        return teacher
    if teacher_weight is None:
        return student
    return LogitTransform(scale=student.scale, softcap=student.softcap, temperature=student.temperature)


def transform_scalars(head: LogitTransform, temperature: float) -> tuple[float, float | None, float]:
    """(scale, softcap, temperature) of a head, whose own temperature wins over the call's."""
    own = temperature if head.temperature is None else head.temperature
    return float(head.scale), None if head.softcap is None else float(head.softcap), float(own)


def objective_of(
    alpha: float,
    normalize: bool,
    temperature: float,
    student_head: LogitTransform,
    teacher_head: LogitTransform,
    support: TopK | str | None,
    teacher: TeacherMix | TopKLogprobs | None,
    importance: ImportanceClip | None,
    entry_clip: float | None,
) -> Objective:
    """What a call computes, its options having been checked; TopKLogprobs alone means a top-k support with a tail."""
    if isinstance(teacher, TopKLogprobs) and support is None:
        support = TopK(teacher.ids.shape[1], of="teacher")
    restricted = support if isinstance(support, TopK) else None
    return Objective(
        alpha=float(alpha),
        normalize=normalize,
        support="topk" if restricted is not None else "full" if support is None else "sampled",
        topk=0 if restricted is None else restricted.k,
        topk_of="student" if restricted is None else restricted.of,
        tail=restricted is None or restricted.tail,
        entry_clip=None if entry_clip is None else float(entry_clip),
        importance_clip=math.inf if importance is None else float(importance.clip),
        mix_share=float(teacher.share) if isinstance(teacher, TeacherMix) else 0.0,
        student=transform_scalars(student_head, temperature),
        teacher=transform_scalars(teacher_head, temperature),
    )
