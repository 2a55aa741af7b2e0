"""Binds the options of the fused divergence in a module: they are set once, the tensors come with each call.

What it computes, and everything about dtypes, memory and errors, is `sdkernels.linear_divergence`; nothing is added but
that a sampler's log-probabilities are given as `old_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sdkernels import (
    DivergenceOutput,
    ImportanceClip,
    LogitTransform,
    TeacherMix,
    TopK,
    TopKLogprobs,
    linear_divergence,
)
from sdkernels.types import Backend, Gradient, Nonfinite, Options, Reduction
from sdkernels.validation import check_number, check_options, check_support, check_vocab_size

from ..errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class DivergenceOptions:
    """Holds the options of `sdkernels.linear_divergence`; raises `TypeError` and `ValueError` by its rules."""

    alpha: float = 1.0
    normalize: bool = False
    temperature: float = 1.0
    support: TopK | str | None = None
    entry_clip: float | None = None
    vocab_size: int | None = None
    backend: Backend = "auto"
    gradient: Gradient = "auto"
    gradient_tolerance: float | None = None
    workspace_mb: float | None = None
    on_nonfinite: Nonfinite = "propagate"

    def __post_init__(self) -> None:
        options = Options(**vars(self))
        check_options(options)
        check_vocab_size(self.vocab_size, None)
        check_support(options, self.vocab_size)


class FusedLinearDivergence(nn.Module):
    """Calls `linear_divergence` with its options bound.

        loss = FusedLinearDivergence(alpha=0.5, support=TopK(100), importance_clip=2.0)
        out = loss(student_hidden, lm_head.weight, teacher_hidden, target_ids=ids, old_logprobs=old)
        out.loss.backward()

    `importance_clip` needs `old_logprobs` in every call; None ignores none: giving them without it is an error. All
    other options are those of `sdkernels.linear_divergence`, which says of the tensors what is wrong with them; of the
    options it is said here, by the same rules: raises `TypeError` and `ValueError` when it is made.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        normalize: bool = False,
        temperature: float = 1.0,
        support: TopK | str | None = None,
        importance_clip: float | None = None,
        entry_clip: float | None = None,
        vocab_size: int | None = None,
        backend: Backend = "auto",
        gradient: Gradient = "auto",
        gradient_tolerance: float | None = None,
        workspace_mb: float | None = None,
        on_nonfinite: Nonfinite = "propagate",
    ) -> None:
        super().__init__()
        self.options = DivergenceOptions(
            alpha=alpha,
            normalize=normalize,
            temperature=temperature,
            support=support,
            entry_clip=entry_clip,
            vocab_size=vocab_size,
            backend=backend,
            gradient=gradient,
            gradient_tolerance=gradient_tolerance,
            workspace_mb=workspace_mb,
            on_nonfinite=on_nonfinite,
        )
        if importance_clip is not None:
            check_number("importance_clip", importance_clip, 0.0, open_low=True)
        self.importance_clip = importance_clip

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        *,
        student_head: LogitTransform | None = None,
        teacher_head: LogitTransform | None = None,
        teacher: TeacherMix | TopKLogprobs | None = None,
        token_weights: Tensor | None = None,
        target_ids: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        reduction: Reduction = "mean",
        process_group: ProcessGroup | None = None,
        normalizer_group: ProcessGroup | None = None,
    ) -> DivergenceOutput:
        """Makes a `DivergenceOutput` of hidden states (N, H) and heads (V, H) of both sides; `old_logprobs` is (N,).

        `process_group`: the ranks over which the heads are sharded. `normalizer_group`: those over which the rows of a
        mean are spread.
        """
        self.check(old_logprobs)
        importance = None
        if old_logprobs is not None and self.importance_clip is not None:
            importance = ImportanceClip(old_logprobs, self.importance_clip)
        return linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_head=student_head,
            teacher_head=teacher_head,
            teacher=teacher,
            token_weights=token_weights,
            target_ids=target_ids,
            importance=importance,
            reduction=reduction,
            process_group=process_group,
            normalizer_group=normalizer_group,
            **vars(self.options),
        )

    def check(self, old_logprobs: Tensor | None) -> None:
        """Refuses a sampler's log-probabilities without an `importance_clip`, and the other way round."""
        if (old_logprobs is None) != (self.importance_clip is None):
            came = "None" if old_logprobs is None else "a tensor"
            raise ArgumentError(
                f"old_logprobs must be given where importance_clip is, and only there; it is {self.importance_clip}, "
                f"got {came}"
            )

    def extra_repr(self) -> str:
        shown = vars(self.options) | {"importance_clip": self.importance_clip}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
