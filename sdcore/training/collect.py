"""Turns examples into judged groups: prompt ids, completions, rewards.

    collected = collector.collect(model, batches, seeds)      # collected.groups[batch][group].rollouts[completion]

A batch is sampled with a seed of its own, so what is sampled for it does not depend on which process does it, nor on
what was sampled before. Where the method learns from completions in the data, those are taken and nothing is sampled.
A share of what is sampled may be the teacher's: drawn with its weights, after its prompt.

Not covered: prompts that are cut; one that is too long is an error, since the question is what is asked.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..contexts import ContextBuilder, SuccessOrFeedback, student_prompt_ids
from ..contexts.teacher_prompts import columns_of
from ..errors import ArgumentError, DataError
from ..presets.method import Method
from ..rollouts.environments import Agent
from ..rollouts.episodes import play
from ..rollouts.rewards import OnError, Reward, Scored, judge
from ..rollouts.samplers import ModelSampler, Sampler, Sampling, sample_groups, seed_of, whole_weights
from ..rollouts.window import given_completion
from ..teachers import Teacher
from ..types import Example, Group, Trajectory
from .config import SelfDistillationConfig
from .turns import counts_of


def kwargs_of(given: Any, agent: Agent | None) -> dict[str, Any]:
    """Returns what the chat template gets for every prompt of a run: the arguments', and the tools there are."""
    return {**(given or {}), **({"tools": agent.schemas} if agent is not None and agent.schemas else {})}


class Collected(NamedTuple):
    """Holds groups, as the batches of examples were, and what is to be logged."""

    groups: list[list[Group]]
    counts: dict[str, int]
    means: dict[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Collector:
    """Samples and judges. Raises `DataError` and what sampling and rewards raise."""

    tokenizer: Any
    sampler: Sampler = field(default_factory=ModelSampler)
    stop_ids: Sequence[int] = ()  # this and the next five: see `Sampling`
    num_generations: int = 1
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    rewards: Sequence[Reward] = ()
    from_data: bool = False  # True: completions are the examples' own
    max_prompt_length: int | None = None  # tokens; None: what the model can read
    chat_template_kwargs: Mapping[str, Any] | None = None
    timeout: float | None = 60.0  # this and the next two: see `rollouts.rewards.judge`
    on_error: OnError = "raise"
    workers: int = 1
    teacher_samples: float = 0.0  # share of the completions that the teacher draws
    read_elsewhere: Collection[str] = frozenset()  # columns that the chat template need not use
    agent: Agent | None = None  # who answers the student; None: nobody does, a completion is an answer

    @property
    def sampling(self) -> Sampling:
        """Says how completions are drawn."""
        return Sampling(
            num_completions=self.num_generations,
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=None if self.top_p == 1 else self.top_p,
            top_k=self.top_k,
            eos_token_id=tuple(self.stop_ids),
            pad_token_id=getattr(self.tokenizer, "pad_token_id", None),
        )

    @classmethod
    def of_run(
        cls, args: SelfDistillationConfig, method: Method, context: ContextBuilder, agent: Agent | None, **others: Any
    ) -> Collector:
        """Makes the collector of a run's training steps; the others are fields."""
        return cls(
            num_generations=method.num_generations,
            max_completion_length=args.max_completion_length,
            temperature=args.sampling_temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            from_data=method.samples == "dataset",
            max_prompt_length=args.max_prompt_length,
            chat_template_kwargs=kwargs_of(args.chat_template_kwargs, agent),
            agent=agent,
            timeout=args.reward_timeout,
            on_error=cast(OnError, args.reward_on_error),
            workers=args.reward_workers,
            teacher_samples=method.teacher_samples,
            read_elsewhere=columns_of(context),
            **others,
        )

    def check(self, teacher: Any, context: ContextBuilder, state: Any) -> None:
        """Raises `ArgumentError` where a teacher and a context, a user's own perhaps, cannot have `teacher_samples`."""
        if self.teacher_samples == 0:
            return
        if not hasattr(teacher, "weights") or isinstance(context, SuccessOrFeedback):
            raise ArgumentError(
                "teacher_samples must be 0 but for a teacher that is one set of weights and a context that is known "
                f"before anything is sampled, got {self.teacher_samples} with {type(teacher).__name__} and "
                f"{type(context).__name__}"
            )
        is_sharded = getattr(state, "fsdp_plugin", None) is not None
        if not teacher.shares_weights and (is_sharded or not isinstance(self.sampler, ModelSampler)):
            raise ArgumentError(
                "teacher_samples must be 0 under FSDP2 and with a sampler of one's own, which both sample from the "
                f"student's weights, but for teacher='live', got {self.teacher_samples} with {type(teacher).__name__}"
            )

    def collect(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Example]],
        seeds: Sequence[int],
        other: tuple[Teacher, ContextBuilder] | None = None,
    ) -> Collected:
        """Samples and judges batches, one seed for each. With FSDP2 to be called by all ranks.

        `other` draws the `teacher_samples`: a teacher, after the prompts that a builder makes.
        """
        with nullcontext() if self.from_data else whole_weights(model, self.sampler):
            drawn = [self.draw(model, batch, seed, other) for batch, seed in zip(batches, seeds, strict=True)]
        scored = self.judge([group for groups in drawn for group in groups])
        counts = scored.counts | counts_of(scored.groups)
        means = {f"rewards/{name}/mean": total / number for name, (total, number) in scored.sums.items() if number}
        judged = iter(scored.groups)
        return Collected([[next(judged) for _ in groups] for groups in drawn], counts, means)

    def draw(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        seed: int,
        other: tuple[Teacher, ContextBuilder] | None = None,
    ) -> list[Group]:
        """Returns groups that are not judged yet. With FSDP2 to be called inside `whole_weights`."""
        if self.agent is not None:
            options: Any = {"tokenizer": self.tokenizer, "chat_template_kwargs": self.chat_template_kwargs}
            return play(self.agent, self.sampler, model, examples, self.sampling, seed=seed, **options)
        prompts = [self.prompt(example) for example in examples]
        if other is not None and self.teacher_samples > 0:
            return self._by_both(model, examples, prompts, seed, *other)
        if not self.from_data:
            sampling, tokenizer = self.sampling, self.tokenizer
            return sample_groups(self.sampler, model, examples, prompts, sampling, tokenizer=tokenizer, seed=seed)
        return [
            Group(example=example, prompt_ids=prompt, rollouts=(self.given(example, prompt),))
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def _by_both(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        prompts: Sequence[Tensor],
        seed: int,
        teacher: Teacher,
        context: ContextBuilder,
    ) -> list[Group]:
        """Returns groups of the student's completions and, behind them, the teacher's.

        A share that is no whole number of completions is rounded up or down at random, for each group. Where there is
        nothing privileged to read, the student draws all.
        """
        # The builder is asked before there are completions, about one of the greatest length.
        unknown = torch.zeros(self.max_completion_length, dtype=torch.int64)
        rollouts = (Trajectory.answer(completion_ids=unknown, logprobs=None, text="", finished=False),)
        asked = [Group(example=e, prompt_ids=ids, rollouts=rollouts) for e, ids in zip(examples, prompts, strict=True)]
        seen = [context.condition(group, self.tokenizer) for group in asked]
        size, rng = self.num_generations, random.Random(seed_of(seed, 0))
        shares = [int(size * self.teacher_samples + rng.random()) if each.active[0] else 0 for each in seen]

        def drawn(module: nn.Module, after: Sequence[Tensor], counts: Sequence[int], part: int) -> list[Any]:
            """Returns so many completions of each: as many of all are drawn as of the one with most, at a time."""
            rows = [row for row, count in enumerate(counts) if count]
            if not rows:
                return [()] * len(counts)
            sampling, given = replace(self.sampling, num_completions=max(counts)), [examples[row] for row in rows]
            options = {"tokenizer": self.tokenizer, "seed": seed_of(seed, part)}
            groups = sample_groups(self.sampler, module, given, [after[row] for row in rows], sampling, **options)
            of_row = {row: group.rollouts for row, group in zip(rows, groups, strict=True)}
            return [of_row[row][:count] if count else () for row, count in enumerate(counts)]

        own = drawn(model, prompts, [size - share for share in shares], 1)
        with teacher.weights(model) as module:
            others = drawn(module, [each.teacher_prompts[0] for each in seen], shares, 2)
        return [
            replace(group, rollouts=(*mine, *(replace(rollout, by_teacher=True) for rollout in theirs)))
            for group, mine, theirs in zip(asked, own, others, strict=True)
        ]

    def ask_again(
        self, model: nn.Module, groups: Sequence[Group], context: ContextBuilder, seed: int
    ) -> tuple[list[Group], list[Group]]:
        """Asks once more for every completion that a teacher has something to read about: with it in view, and without.

        Returns both judged, a group of one completion for each, as many at a time as there are groups.
        """
        asked: list[tuple[Group, Tensor]] = []
        for group in groups:
            seen = context.condition(group, self.tokenizer)
            read = zip(seen.teacher_prompts, seen.active, strict=True)
            asked += [(group, prompt) for prompt, active in read if active]

        def answered(side: int, prompts: Sequence[Tensor]) -> list[Group]:
            one, drawn = replace(self.sampling, num_completions=1), []
            for start in range(0, len(asked), len(groups)):
                part = slice(start, start + len(groups))
                options: Any = {"tokenizer": self.tokenizer, "seed": seed_of(seed, side, start)}
                examples = [group.example for group, _ in asked[part]]
                drawn += sample_groups(self.sampler, model, examples, prompts[part], one, **options)
            return self.judge(drawn).groups

        return answered(0, [prompt for _, prompt in asked]), answered(1, [group.prompt_ids for group, _ in asked])

    def judge(self, groups: Sequence[Group]) -> Scored:
        """Asks the reward functions about every completion."""
        return judge(groups, self.rewards, timeout=self.timeout, on_error=self.on_error, workers=self.workers)

    def prompt(self, example: Example) -> Tensor:
        """Returns what the student reads, (P,) int64."""
        if self.agent is not None and isinstance(example.prompt, str):
            raise DataError(f"{example.source}: the prompt must be a conversation where others answer, got text")
        ids = student_prompt_ids(
            example,
            self.tokenizer,
            chat_template_kwargs=self.chat_template_kwargs,
            read_elsewhere=self.read_elsewhere,
        )
        most = self.max_prompt_length
        if most is not None and len(ids) > most:
            raise DataError(f"{example.source}: a prompt may have max_prompt_length={most} tokens, got {len(ids)}")
        return ids

    def given(self, example: Example, prompt: Tensor) -> Trajectory:
        """Returns the completion that the data has for the prompt."""
        return given_completion(
            example,
            self.tokenizer,
            prompt,
            stop_ids=self.stop_ids,
            max_length=self.max_completion_length,
            chat_template_kwargs=self.chat_template_kwargs,
        )
