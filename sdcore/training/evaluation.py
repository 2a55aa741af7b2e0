"""Evaluates a model by sampling: the same questions with the same seeds, judged by the same reward functions.

    result = evaluate(model, tokenizer, examples, [exact], num_generations=4, max_completion_length=256, seed=0)
    result.metrics["reward_mean"], result.metrics["reward_stderr"], result.groups[0].rollouts[0].text

What differs from the obvious: seeds belong to batches of questions and not to a stream, so that two models, or one
model at two steps, are compared on the same draws, global random states stay as they are, and how many processes share
the work does not matter. Another `batch_size` draws other samples. The standard error is over questions: completions of
one question are no independent measurements.

A method can teach no more than its teacher knows. With `context`, what a method's teacher reads, questions are asked
again with that in view and without, which says before any training whether there is something to learn.

Not covered: losses on held-out data, and judging by something other than a reward function.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from torch import nn

from ..contexts import ContextBuilder, No
from ..contexts.rendering import TEMPLATE_INPUTS
from ..contexts.teacher_prompts import check_examples, columns_of
from ..errors import ArgumentError, require_positive
from ..models import find_body
from ..rollouts.environments import Agent
from ..rollouts.rewards import OnError, Reward, RewardFunction, prepare
from ..rollouts.samplers import ModelSampler, Sampler, seed_of, stop_ids, whole_weights
from ..types import Example, Group
from .collect import Collector, kwargs_of
from .config import OnBadRow
from .rows import Rows
from .turns import counts_of

# What every evaluation measures, beside how long it took; and one that judges.
MEASURED: Final = ("questions", "mean_length", "clipped_ratio", "runtime", "samples_per_second")
JUDGED: Final = ("reward_mean", "reward_stderr", "success_rate", "pass_any", "dropped")
REPEATED: Final = ("reward_mean", "reward_stderr", "success_rate")  # of what is asked again
# Told apart from training's seeds, which have other parts.
EVALUATION = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalResult:
    """Holds what was sampled, and what it is worth."""

    groups: tuple[Group, ...]  # in the order of the examples
    metrics: dict[str, float]  # reward_mean, reward_stderr, success_rate, pass_any, mean_length, clipped_ratio, ...
    in_view: tuple[Group, ...] = ()  # with `context`: one for each completion asked again, with the teacher's prompt


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    reward_funcs: Sequence[RewardFunction | Reward | str] = (),
    *,
    num_generations: int = 1,
    max_completion_length: int = 256,
    seed: int = 0,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    reward_weights: Sequence[float] | None = None,
    success_threshold: float = 0.5,
    timeout: float | None = 60.0,
    on_error: OnError = "raise",
    workers: int = 1,
    on_bad_row: OnBadRow | None = "raise",
    sampler: Sampler | None = None,
    agent: Agent | None = None,
    context: ContextBuilder | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] | None = None,
    advance: Callable[[int], object] | None = None,
) -> EvalResult:
    """Samples `num_generations` completions of every example's prompt, as the student sees it, and judges them.

    Args:
        batch_size: questions sampled at a time.
        stop_token_ids: what ends a completion; None or none: what `stop_ids` finds.
        success_threshold: reward from which a completion is a success.
        timeout, on_error, workers, reward_weights: as in `rollouts.rewards.judge`. With "drop", a completion that
            could not be judged is left out of the means and counted.
        on_bad_row: "skip" leaves out rows that cannot be rendered, or are too long for the model, and logs them; None
            is for rows that `Rows.usable` has returned, and asks about none.
        sampler: None: the model itself.
        agent: who answers the student, in trajectories of several turns; None: nobody.
        context: a method's, of `Method.build_context`, or a builder of one's own; with `agent` None. Where it has
            something to show about a completion, its question is asked once more with that in view, and once more
            without: `with_context_reward_mean`, `without_context_reward_mean`, their `_stderr` and `_success_rate`.
        rank, world_size, gather: to share the batches over processes; `gather` gives the lists of all of them.
        advance: called with the number of questions that are done, for a progress bar.

    Dropout is off meanwhile and modes are put back. Raises `ArgumentError`, what `Rows.usable` says of a row before
    anything is sampled, and what sampling and rewards raise.
    """
    if not examples:
        raise ArgumentError("examples must have at least one, got none")
    if context is not None:
        if agent is not None:
            raise ArgumentError("context must be None with an agent, whose turns cannot be asked again one by one")
        check_examples(context, examples)
    require_positive(
        batch_size=batch_size, num_generations=num_generations, max_completion_length=max_completion_length
    )
    collector = Collector(
        tokenizer=tokenizer,
        sampler=ModelSampler() if sampler is None else sampler,
        stop_ids=stop_token_ids or stop_ids(model, tokenizer),
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        rewards=prepare(reward_funcs, reward_weights),
        chat_template_kwargs=kwargs_of(chat_template_kwargs, agent),
        agent=agent,
        timeout=timeout,
        on_error=on_error,
        workers=workers,
        read_elsewhere=(frozenset() if context is None else columns_of(context))
        | (frozenset() if on_bad_row else frozenset(TEMPLATE_INPUTS)),
    )
    if on_bad_row is not None:
        body = find_body(model) if isinstance(collector.sampler, ModelSampler) else None  # an engine knows its limits
        rows = Rows(collector=collector, body=body, context=context or No(), on_bad_row=on_bad_row, rank=rank)
        examples = rows.usable(examples, "examples")
    parts: list[_Part] = []
    with whole_weights(model, collector.sampler):
        for number, start in list(enumerate(range(0, len(examples), batch_size)))[rank::world_size]:
            batch = examples[start : start + batch_size]
            own = seed_of(seed, EVALUATION, number)
            judged = collector.judge(collector.draw(model, batch, own))
            again = ([], []) if context is None else collector.ask_again(model, judged.groups, context, own)
            parts.append(_Part(number, judged.groups, judged.counts, *again))
            if advance is not None:
                advance(len(batch))
    if gather is not None:
        parts = gather(parts)
    parts.sort(key=lambda part: part.number)
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    groups = [group for part in parts for group in part.groups]
    metrics = _metrics(groups, counts, success_threshold)
    if context is None:
        return EvalResult(groups=tuple(groups), metrics=metrics)
    seen = [group for part in parts for group in part.with_context]
    bare = [group for part in parts for group in part.without_context]
    metrics["asked_again"] = float(len(seen))
    for name, asked in (("with_context", seen), ("without_context", bare)):
        found = _metrics(_by_question(asked), {}, success_threshold)
        metrics |= {f"{name}_{of}": found[of] for of in REPEATED if of in found}
    return EvalResult(groups=tuple(groups), metrics=metrics, in_view=tuple(seen))


class _Part(NamedTuple):
    """Is what came of one batch of questions."""

    number: int
    groups: list[Group]
    counts: dict[str, int]
    with_context: list[Group]
    without_context: list[Group]


def _by_question(groups: Sequence[Group]) -> list[Group]:
    """Joins the groups of equal questions."""
    of_question: dict[int, list[Group]] = {}
    for group in groups:
        of_question.setdefault(id(group.example), []).append(group)
    return [
        replace(same[0], rollouts=tuple(rollout for group in same for rollout in group.rollouts))
        for same in of_question.values()
    ]


def _metrics(groups: Sequence[Group], counts: Mapping[str, int], threshold: float) -> dict[str, float]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {
        "questions": float(len(groups)),
        "mean_length": _mean([sum(len(turn.ids) for turn in rollout.own) for rollout in rollouts]),
        "clipped_ratio": _mean([not rollout.finished for rollout in rollouts]),
    }
    if ended := counts_of(groups):
        metrics |= {"mean_turns": _mean([len(rollout.own) for rollout in rollouts])}
        metrics |= {name: float(count) for name, count in ended.items()}
    rewards_B = [[r.reward for r in group.rollouts if r.reward is not None] for group in groups]
    judged_B = [rewards for rewards in rewards_B if rewards]
    if judged_B:
        means = [_mean(rewards) for rewards in judged_B]
        centre = _mean(means)
        spread = math.sqrt(sum((mean - centre) ** 2 for mean in means) / max(1, len(means) - 1))
        metrics |= {
            "reward_mean": centre,
            "reward_stderr": spread / math.sqrt(len(means)),
            "success_rate": _mean([_mean([reward >= threshold for reward in rewards]) for rewards in judged_B]),
            "pass_any": _mean([max(rewards) >= threshold for rewards in judged_B]),
        }
    dropped = counts.get("rewards/dropped", 0)
    return metrics | ({"dropped": float(dropped)} if counts else {})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
