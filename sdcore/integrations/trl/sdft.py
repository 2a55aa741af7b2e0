"""TRL's SDFT trainer with a fused loss and teachers of the weights in memory.

    trainer = FusedSDFTTrainer(model, args=SDFTConfig(...), train_dataset=data)     # prompt, privileged_context
    trainer.train()

Arguments and configuration are those of `trl.experimental.sdft.SDFTTrainer`, plus `fused`; see `fused`, and
`docs/integrations/trl.md` for what is the same and what is added.

Not covered: what TRL's trainer does not do either, such as iterable data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

from ...errors import ArgumentError
from .feedback import PromptLengths, log_truncated
from .fused import FusedMixin


class _ContextBuilder(DemonstrationTeacherContextBuilder):
    """TRL's, which tells what was cut."""

    def build(self, *args: Any, **kwargs: Any) -> Any:
        found = super().build(*args, **kwargs)
        lengths = self.trainer.prompt_lengths  # of the prompts that were tokenized last, which are the teacher's
        log_truncated(self.trainer, lengths.truncated(self.trainer.max_prompt_length, "max_prompt_length"))
        return found


class _FusedSDFT(FusedMixin):
    """What is SDFT's own."""

    OVERRIDES: ClassVar[tuple[str, ...]] = (*FusedMixin.OVERRIDES, "_tokenize_prompts")

    def _set_up_contexts(self) -> None:
        trainer: Any = self
        if type(trainer.teacher_context_builder) is not DemonstrationTeacherContextBuilder:
            raise ArgumentError(
                "teacher_context_builder must be TRL's own, which is extended here, got "
                f"{type(trainer.teacher_context_builder).__name__}"
            )
        self.prompt_lengths = PromptLengths()
        trainer.teacher_context_builder = _ContextBuilder(self)

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        trainer: Any = self
        mask: Tensor = inputs["completion_mask"]
        positions = torch.arange(mask.shape[1], device=mask.device)
        return mask * (positions >= trainer.num_loss_tokens_to_skip)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        trainer: Any = self
        limit, trainer.max_prompt_length = trainer.max_prompt_length, None
        try:
            found = super()._tokenize_prompts(prompts)  # type: ignore[misc]
        finally:
            trainer.max_prompt_length = limit
        self.prompt_lengths.seen(found)
        return found if limit is None else [ids[-limit:] for ids in found]


class FusedSDFTTrainer(_FusedSDFT, SDFTTrainer):
    """`SDFTTrainer` without logits. Takes its arguments, and `fused`, a `FusedOptions`."""


__all__ = ["FusedSDFTTrainer"]
