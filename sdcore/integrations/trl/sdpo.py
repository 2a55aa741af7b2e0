"""Gives TRL's SDPO trainer a fused loss, a text per completion, and teachers of the weights in memory.

    def verify(prompts, completions, **columns):
        return [(0.0, "test 3 failed: expected 4, got 5"), (1.0, None), None, 0.5]

    trainer = FusedSDPOTrainer(model, reward_funcs=verify, args=SDPOConfig(...), train_dataset=data)
    trainer.train()

Arguments and configuration are those of `trl.experimental.sdpo.SDPOTrainer`, plus `fused`; see `FusedOptions`, and
`docs/integrations/trl.md` for what is the same and what is added.

A reward function may return, for each completion, a number, None (not judged), or a pair of a number and a text about
this completion. TRL's trainer can only show the teacher one text per prompt, a column of the data
(`privileged_context`).

What differs from the obvious: a completion's own text takes the place of its prompt's, which it does not join. An empty
text, or None in its place, is none. Texts of several reward functions are put below each other.

Not covered: texts from reward models, which return numbers; and what TRL's trainer does not do either (its `beta` is
stored and never used).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl.experimental.sdpo import SDPOTrainer
from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder

from ...errors import ArgumentError
from ...losses import PolicyTerm
from .padded import PaddedPlan
from .self_distillation import AGGREGATIONS, SelfDistillationMixin


class TextCollector:
    """Lets reward functions return what TRL expects, while their texts are kept here."""

    def __init__(self, count: int) -> None:
        self.texts_B: list[list[str]] = [[] for _ in range(count)]

    def wrap(self, function: Any, name: str) -> Any:
        """Returns a reward model as it is, and a function with the texts taken out of what it returns."""
        if isinstance(function, nn.Module):
            return function

        def numbers_only(*args: Any, **kwargs: Any) -> list[Any]:
            return [self._take(row, value, name) for row, value in enumerate(function(*args, **kwargs))]

        return numbers_only

    def feedback(self) -> list[str | None]:
        """Returns what all functions said of each completion, line by line; None where none said anything."""
        return ["\n".join(texts) if texts else None for texts in self.texts_B]

    def _take(self, row: int, value: Any, name: str) -> Any:
        if not isinstance(value, tuple):
            return value
        number, text = value if len(value) == 2 else (value, value)
        is_number = number is None or isinstance(number, Real | torch.Tensor)
        if not is_number or not (text is None or isinstance(text, str)):
            raise ArgumentError(
                f"reward function {name} must return numbers, None, or pairs of a number and a text, got {value!r} for "
                f"completion {row}"
            )
        if text is not None and text.strip() and row < len(self.texts_B):
            self.texts_B[row].append(text)
        return number


def merged(own: Sequence[str | None], given: Sequence[Any] | None) -> list[Any]:
    """Returns each completion's own text, or else its prompt's."""
    given = [None] * len(own) if given is None else given
    return [other if text is None else text for text, other in zip(own, given, strict=True)]


class _ContextBuilder(SuccessfulRolloutTeacherContextBuilder):
    """Builds the teacher's prompts as TRL does, from what the reward functions said, and logs what was cut of them."""

    def build(self, output: Any, prompts: Any, rewards: Tensor, feedbacks: Any = None) -> Any:
        texts_B, self.trainer.texts_B = self.trainer.texts_B, None
        if texts_B is not None:
            feedbacks = merged(texts_B, feedbacks)
        context = super().build(output, prompts, rewards, feedbacks=feedbacks)
        self.trainer.log_truncated(self.trainer.args.max_reprompt_len, "max_reprompt_len")
        return context


class FusedSDPOTrainer(SelfDistillationMixin, SDPOTrainer):
    """Trains as `SDPOTrainer` does, without logits. Takes its arguments, and `fused`, a `FusedOptions`.

    Adds what is SDPO's own: rewards with texts, and the policy loss.
    """

    OVERRIDES: ClassVar[tuple[str, ...]] = (
        *SelfDistillationMixin.OVERRIDES,
        "_calculate_rewards",
        "_tokenize_prompts_untruncated",
    )
    REPLACES: ClassVar[tuple[str, ...]] = (*SelfDistillationMixin.REPLACES, "_compute_policy_loss")

    def _set_up(self) -> None:
        super()._set_up()
        builder = getattr(self, "teacher_context_builder", None)
        if builder is not None and type(builder) is not SuccessfulRolloutTeacherContextBuilder:
            raise ArgumentError(
                f"teacher_context_builder must be TRL's own, which is extended here, got {type(builder).__name__}"
            )
        self.texts_B: list[str | None] | None = None  # what the reward functions have said of this batch
        self.teacher_context_builder = _ContextBuilder(self)

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        chosen = inputs.get("self_distillation_mask")
        mask: Tensor = inputs["completion_mask"]
        return mask if chosen is None else mask * chosen.unsqueeze(1)

    def _policy_term(self, inputs: dict[str, Any], padded: PaddedPlan) -> PolicyTerm:
        mask = inputs["completion_mask"] != 0
        if self.loss_type not in AGGREGATIONS:
            raise ArgumentError(f"loss_type must be one of {', '.join(AGGREGATIONS)}, got {self.loss_type!r}")
        weights, normalizer = self._reduced(mask, self.loss_type)
        advantages = inputs["advantages"]
        old = inputs.get("old_per_token_logps")
        rows = padded.gather(weights)
        shown = padded.gather(advantages if advantages.dim() == 2 else advantages[:, None].expand(padded.shape))
        return PolicyTerm(
            advantages=shown.to(rows.dtype),
            old_logprobs=None if old is None else padded.gather(old),
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            token_weights=rows,
            normalizer=normalizer,
            temperature=self.temperature,
            distillation_weight=self._distillation_weight,
            completion_of=padded.completion_of if self.importance_sampling_level == "sequence" else None,
        )

    def _tokenize_prompts_untruncated(self, prompts: Any) -> Any:
        ids_B = super()._tokenize_prompts_untruncated(prompts)
        self.prompt_lengths.seen(ids_B)
        return ids_B

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Makes TRL's rewards of the numbers, and keeps the texts for the teacher's prompts."""
        collector, functions = TextCollector(len(prompts)), self.reward_funcs
        names = self.reward_func_names
        self.reward_funcs = [collector.wrap(function, name) for function, name in zip(functions, names, strict=True)]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        self.texts_B = collector.feedback()
        return rewards
