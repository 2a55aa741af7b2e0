"""From the public options of a call to the scalars that say what is computed."""

from __future__ import annotations

import math

from torch import Tensor

from .types import ImportanceClip, LogitTransform, Objective, TeacherMix, TopK, TopKLogprobs


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
