"""Gives TRL's SDFT trainer a fused loss, and teachers of the weights in memory.

    trainer = FusedSDFTTrainer(model, args=SDFTConfig(...), train_dataset=data)     # prompt, privileged_context
    trainer.train()

Arguments and configuration are those of `trl.experimental.sdft.SDFTTrainer`, plus `fused`; see `FusedOptions`,
and `docs/integrations/trl.md` for what is the same and what is added.

Not covered: what TRL's trainer does not do either, such as iterable data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

from ...errors import ArgumentError
from .self_distillation import SelfDistillationMixin


class _ContextBuilder(DemonstrationTeacherContextBuilder):
    """Builds the teacher's prompts as TRL does, and logs what was cut of them."""

    def build(self, *args: Any, **kwargs: Any) -> Any:
        context = super().build(*args, **kwargs)
        self.trainer.log_truncated(self.trainer.max_prompt_length, "max_prompt_length")
        return context


class FusedSDFTTrainer(SelfDistillationMixin, SDFTTrainer):
    """Trains as `SDFTTrainer` does, without logits. Takes its arguments, and `fused`, a `FusedOptions`.

    Adds what is SDFT's own: tokens without a loss, and a limit for all prompts.
    """

    OVERRIDES: ClassVar[tuple[str, ...]] = (*SelfDistillationMixin.OVERRIDES, "_tokenize_prompts")

    def _set_up(self) -> None:
        super()._set_up()
        if type(self.teacher_context_builder) is not DemonstrationTeacherContextBuilder:
            raise ArgumentError(
                "teacher_context_builder must be TRL's own, which is extended here, got "
                f"{type(self.teacher_context_builder).__name__}"
            )
        self.teacher_context_builder = _ContextBuilder(self)

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        mask: Tensor = inputs["completion_mask"]
        positions = torch.arange(mask.shape[1], device=mask.device)
        return mask * (positions >= self.num_loss_tokens_to_skip)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        limit, self.max_prompt_length = self.max_prompt_length, None
        try:
            ids_B = super()._tokenize_prompts(prompts)
        finally:
            self.max_prompt_length = limit
        self.prompt_lengths.seen(ids_B)
        return ids_B if limit is None else [ids[-limit:] for ids in ids_B]
