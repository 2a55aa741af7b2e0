"""From examples to judged groups: prompt ids, completions, rewards.

    found = collector.collect(model, batches, seeds)          # found.groups[batch][group].rollouts[completion]
    result = collector.evaluate(model, examples)              # result.metrics["reward_mean"]

A batch is sampled with a seed of its own, so what is sampled for it does not depend on which process does it, nor on
what was sampled before. Where the method learns from completions in the data, those are taken and nothing is sampled.

Not covered: prompts that are cut; one that is too long is an error, since the question is what is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from accelerate.utils import gather_object  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from ..contexts import student_prompt_ids
from ..errors import DataError
from ..presets.method import Method
from ..rollouts.rewards import Reward, judge
from ..rollouts.samplers import Sampler, require_room, whole_weights
from ..rollouts.window import given_completion
from ..types import Example, Group
from .config import SelfDistillationConfig
from .evaluation import EvalResult, evaluate, group_of


class Collected(NamedTuple):
    """Groups, as the batches of examples were, and what is to be logged."""

    groups: list[list[Group]]
    counts: dict[str, int]
    means: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Collector:
    """What is needed for it. `collect` raises `DataError` and what sampling and rewards raise."""

    method: Method
    args: SelfDistillationConfig
    tokenizer: Any
    sampler: Sampler
    rewards: Sequence[Reward]
    stop_ids: tuple[int, ...]  # that end a completion

    def collect(self, model: nn.Module, batches: Sequence[Sequence[Example]], seeds: Sequence[int]) -> Collected:
        """One seed per batch. With FSDP2 to be called by all ranks."""
        if self.method.samples == "dataset":
            sampled = [[self._given(example) for example in batch] for batch in batches]
        else:
            with whole_weights(model, self.sampler):
                sampled = [self._sampled(model, batch, seed) for batch, seed in zip(batches, seeds, strict=True)]
        scored = judge(
            [group for groups in sampled for group in groups],
            self.rewards,
            timeout=self.args.reward_timeout,
            on_error=self.args.reward_on_error,  # type: ignore[arg-type]  # checked by the config
            workers=self.args.reward_workers,
        )
        means = {f"rewards/{name}/mean": total / number for name, (total, number) in scored.sums.items() if number}
        judged = iter(scored.groups)
        return Collected([[next(judged) for _ in groups] for groups in sampled], scored.counts, means)

    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> EvalResult:
        """Evaluates as the run's arguments have it, with the same seeds each time. All ranks must call it."""
        args = self.args
        return evaluate(
            model,
            self.tokenizer,
            examples,
            self.rewards,
            num_generations=args.eval_generations,
            max_completion_length=args.max_completion_length,
            seed=args.seed if args.eval_seed is None else args.eval_seed,
            batch_size=args.per_device_eval_batch_size,
            temperature=args.sampling_temperature if args.eval_temperature is None else args.eval_temperature,
            top_p=None if args.top_p == 1 else args.top_p,
            top_k=args.top_k,
            stop_token_ids=self.stop_ids,
            chat_template_kwargs=self._template_kwargs,
            success_threshold=self.method.success_threshold,
            timeout=args.reward_timeout,
            on_error=args.reward_on_error,  # type: ignore[arg-type]  # checked by the config
            workers=args.reward_workers,
            sampler=self.sampler,
            rank=args.process_index,
            world_size=args.world_size,
            gather=gather_object,
        )

    def prompt(self, example: Example) -> Tensor:
        """(P,) int64: what the student reads."""
        ids = student_prompt_ids(example, self.tokenizer, chat_template_kwargs=self._template_kwargs)
        most = self.args.max_prompt_length
        if most is not None and len(ids) > most:
            raise DataError(f"{example.source}: a prompt may have max_prompt_length={most} tokens, got {len(ids)}")
        return ids

    def _sampled(self, model: nn.Module, examples: Sequence[Example], seed: int) -> list[Group]:
        args = self.args
        prompts = [self.prompt(example) for example in examples]
        require_room(self.sampler, model, prompts, args.max_completion_length)
        completions_B = self.sampler.sample(
            model,
            prompts,
            num_completions=self.method.num_generations,
            max_new_tokens=args.max_completion_length,
            temperature=args.sampling_temperature,
            top_p=None if args.top_p == 1 else args.top_p,
            top_k=args.top_k,
            eos_token_id=self.stop_ids,
            pad_token_id=getattr(self.tokenizer, "pad_token_id", None),
            seed=seed,
        )
        return [
            group_of(example, prompt, completions, self.tokenizer)
            for example, prompt, completions in zip(examples, prompts, completions_B, strict=True)
        ]

    def _given(self, example: Example) -> Group:
        prompt = self.prompt(example)
        rollout = given_completion(
            example,
            self.tokenizer,
            prompt,
            stop_ids=self.stop_ids,
            max_length=self.args.max_completion_length,
            chat_template_kwargs=self._template_kwargs,
        )
        return Group(example=example, prompt_ids=prompt, rollouts=(rollout,))

    @property
    def _template_kwargs(self) -> dict[str, Any] | None:
        return self.args.chat_template_kwargs  # type: ignore[return-value]  # parsed by the config


__all__ = ["Collected", "Collector"]
