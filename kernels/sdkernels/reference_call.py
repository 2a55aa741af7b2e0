"""Runs the definition of a divergence, `reference.py`, on the arguments of `linear_divergence`.

The reference takes plain tensors and scalars and imports nothing of ours. This is how the public options are told to
it, for `backend="reference"` and for `testing.run_reference`. It shares nothing with the driver and its backends, so
that a mistake in how they read an option is seen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .reference import ReferenceOutput, Transform, linear_divergence_reference
from .types import LogitTransform, Operands, Options, TeacherMix, TopK, TopKLogprobs
from .validation import check_values


def divergence_by_definition(given: Operands, options: Options) -> list[Any]:
    """Returns loss, row values, the number of active rows and no error of a checked call, rounded to its dtype."""
    check_values(given, options.vocab_size or 0, options.reduction)
    output = reference_output(given, options)
    values = [None if value is None else value.to(given.dtype) for value in output[:-1]]
    hidden = given.student_hidden
    return [*values, torch.tensor(output.active_tokens, device=hidden.device), hidden.new_empty(0)]


def reference_output(given: Operands, options: Options, precision: torch.dtype = torch.float64) -> ReferenceOutput:
    """Returns what the reference says of a call; the graph is that of the student's hidden states, weight and bias."""
    student = options.student_head or LogitTransform()
    teacher = options.teacher_head
    if teacher is None:
        teacher = student if given.teacher_weight is None else replace(student, bias=None)
    mix = options.teacher if isinstance(options.teacher, TeacherMix) else None
    cached = options.teacher if isinstance(options.teacher, TopKLogprobs) else None
    support = options.support if isinstance(options.support, TopK) else None

    def transform(head: LogitTransform, bias: Tensor | None) -> Transform:
        return Transform(bias, head.scale, head.softcap, head.temperature or options.temperature)

    return linear_divergence_reference(
        given.student_hidden,
        given.weight,
        given.teacher_hidden,
        given.teacher_weight,
        alpha=options.alpha,
        normalize=options.normalize,
        student=transform(student, given.student_bias),
        teacher=transform(teacher, teacher.bias),
        topk=support.k if support else None,
        topk_of=support.of if support else "student",
        tail=support.tail if support else True,
        sampled=options.support == "sampled",
        cached_ids=cached.ids if cached else None,
        cached_logprobs=cached.logprobs if cached else None,
        mix_hidden=mix.hidden if mix else None,
        mix_weight=mix.weight if mix else None,
        mix_share=mix.share if mix else 0.5,
        token_weights=given.token_weights,
        target_ids=given.target_ids,
        old_logprobs=options.importance.old_logprobs if options.importance else None,
        importance_clip=options.importance.clip if options.importance else 2.0,
        entry_clip=options.entry_clip,
        vocab_size=options.vocab_size,
        reduction=cast(Literal["mean", "sum", "none"], options.reduction),
        precision=precision,
    )
