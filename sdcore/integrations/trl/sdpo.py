"""TRL's SDPO trainer with a fused loss, texts per completion, and teachers of the weights in memory.

    trainer = FusedSDPOTrainer(model, reward_funcs=verify, args=SDPOConfig(...), train_dataset=data)
    trainer.train()

Arguments and configuration are those of `trl.experimental.sdpo.SDPOTrainer`, plus `fused`; see `fused`, and
`docs/integrations/trl.md` for what is the same and what is added.

Not covered: what TRL's trainer does not do either (its `beta` is stored and never used).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from trl.experimental.sdpo import SDPOTrainer
from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder

from ...errors import ArgumentError
from ...losses import PolicyTerm
from .feedback import PromptLengths, TextCollector, log_truncated, merged
from .fused import AGGREGATIONS, FusedMixin
from .padded import PaddedPlan


class _ContextBuilder(SuccessfulRolloutTeacherContextBuilder):
    """TRL's, which is told what the reward functions said, and tells what it cut."""

    def build(self, output: Any, prompts: Any, rewards: Tensor, feedbacks: Any = None) -> Any:
        texts_B, self.trainer.texts_B = self.trainer.texts_B, None
        if texts_B is not None:
            feedbacks = merged(texts_B, feedbacks)
        found = super().build(output, prompts, rewards, feedbacks=feedbacks)
        log_truncated(self.trainer, self.cut)
        return found

    def _tokenize_teacher_messages(self, teacher_messages_list: Any) -> Any:
        found = super()._tokenize_teacher_messages(teacher_messages_list)
        self.cut = self.trainer.prompt_lengths.truncated(self.trainer.args.max_reprompt_len, "max_reprompt_len")
        return found


class _FusedSDPO(FusedMixin):
    """What is SDPO's own."""

    OVERRIDES: ClassVar[tuple[str, ...]] = (
        *FusedMixin.OVERRIDES,
        "_calculate_rewards",
        "_tokenize_prompts_untruncated",
    )
    REPLACES: ClassVar[tuple[str, ...]] = (*FusedMixin.REPLACES, "_compute_policy_loss")

    def _set_up_contexts(self) -> None:
        trainer: Any = self
        builder = getattr(trainer, "teacher_context_builder", None)
        if builder is not None and type(builder) is not SuccessfulRolloutTeacherContextBuilder:
            raise ArgumentError(
                f"teacher_context_builder must be TRL's own, which is extended here, got {type(builder).__name__}"
            )
        self.prompt_lengths = PromptLengths()
        self.texts_B: list[str | None] | None = None  # what the reward functions have said of this batch
        trainer.teacher_context_builder = _ContextBuilder(self)

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        chosen = inputs.get("self_distillation_mask")
        mask: Tensor = inputs["completion_mask"]
        return mask if chosen is None else mask * chosen.unsqueeze(1)

    def _policy_term(self, inputs: dict[str, Any], padded: PaddedPlan) -> PolicyTerm:
        trainer: Any = self
        mask = inputs["completion_mask"] != 0
        if trainer.loss_type not in AGGREGATIONS:
            raise ArgumentError(f"loss_type must be one of {', '.join(AGGREGATIONS)}, got {trainer.loss_type!r}")
        weights, normalizer = self._reduced(mask, trainer.loss_type)
        advantages = inputs["advantages"]
        old = inputs.get("old_per_token_logps")
        rows = padded.gather(weights)
        shown = padded.gather_completions(advantages) if advantages.dim() == 1 else padded.gather(advantages)
        return PolicyTerm(
            advantages=shown.to(rows.dtype),
            old_logprobs=None if old is None else padded.gather(old),
            clip_low=trainer.epsilon_low,
            clip_high=trainer.epsilon_high,
            token_weights=rows,
            normalizer=normalizer,
            temperature=self.temperature,
            distillation_weight=self._distillation_weight,
            completion_of=padded.completion_of if trainer.importance_sampling_level == "sequence" else None,
        )

    def _tokenize_prompts_untruncated(self, prompts: Any) -> Any:
        found = super()._tokenize_prompts_untruncated(prompts)  # type: ignore[misc]
        self.prompt_lengths.seen(found)
        return found

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's, of the numbers; the texts are kept for the teacher's prompts."""
        trainer: Any = self
        collector, functions = TextCollector(len(prompts)), trainer.reward_funcs
        names = trainer.reward_func_names
        trainer.reward_funcs = [collector.wrap(one, name) for one, name in zip(functions, names, strict=True)]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        finally:
            trainer.reward_funcs = functions
        self.texts_B = collector.feedback()
        return rewards


class FusedSDPOTrainer(_FusedSDPO, SDPOTrainer):
    """`SDPOTrainer` without logits. Takes its arguments, and `fused`, a `FusedOptions`."""


__all__ = ["FusedSDPOTrainer"]
