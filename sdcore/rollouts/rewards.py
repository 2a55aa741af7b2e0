"""Calls reward functions: what they are given, what they may return, and what becomes of one that fails or hangs.

    def exact(*, completion: str, answer: str, **columns) -> float | tuple[float, str | None]:
        right = completion.strip() == answer
        return (1.0, None) if right else (0.0, f"The answer is not {completion!r}.")

    groups = judge(groups, ["rewards.py:exact"], timeout=10).groups

A function is called once per completion with keywords: `prompt`, `completion`, `raw_completion`, `completion_ids`,
`trajectory`, `privileged_context` and every other column of the example; one without `**columns` gets those that it
names. Of special tokens `completion` has tags that open and close alone, such as `<think>` and `</think>`;
`raw_completion` has them all, the end too. Of several turns `completion` is the last, and `trajectory` has all; rewards
and feedback of the environment come before the function's. It may be `async`. The second thing that it may return is
feedback about this very completion, which SDPO shows to the teacher. With several functions the reward is the weighted
sum, and the feedback is that of all of them.

What a function gets wrong has one of two outcomes, whatever it was: an exception, NaN, infinity, None, something that
is no number, more than `timeout` seconds. With `on_error="raise"` it stops the run as a `RewardError` that names
function and row; with "drop" the completion's reward is None, so that it carries no loss, and it is counted.

What differs from the obvious: a function that hangs cannot be killed and is left behind (see `calls`); when 16 are, the
run stops in either case. Functions are called one after the other unless `workers` says that they may run at the same
time; async ones always may.

Not covered: rewards for parts of a completion, and reward models that want batches.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ..contexts import join_feedback
from ..errors import ArgumentError, SdcoreError
from ..types import Example, Group, Trajectory
from .calls import Call, Invalid, call_all, read_number, too_many_left
from .named import load

RewardFunction: TypeAlias = Callable[..., Any]
OnError: TypeAlias = Literal["raise", "drop"]

# What every function may ask for, beside the row's columns; and what TRL calls them.
GIVEN: Final = ("completion", "prompt", "privileged_context", "raw_completion", "completion_ids", "trajectory")
TRLS: Final = frozenset({"prompts", "completions"})


def contains(completion: str, answer: Any) -> float:
    """Judges by words, in place of a function of one's own: 1 where the answer, or one of a list, is in the completion.

    Not within another word or number; upper and lower case are alike. Raises `ArgumentError` for an answer of no words.
    """
    texts = [str(text) for text in (answer if isinstance(answer, list | tuple) else [answer])]
    if answer is None or not all(text.strip() for text in texts):
        raise ArgumentError(f"answer must be a text, a number, or a list of them, got {answer!r}")
    return float(any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", completion, re.IGNORECASE) for text in texts))


class RewardError(SdcoreError, RuntimeError):
    """Says that a reward function raised, hung, or returned no finite number."""


class Scored(NamedTuple):
    """Holds groups with their rewards, and what there is to say about the functions."""

    groups: list[Group]
    counts: dict[str, int]  # "rewards/dropped" completions, and why: "raised", "timeout", "invalid" in its place
    sums: dict[str, tuple[float, int]]  # name of a function → sum and number of the rewards that it gave the student


def judge(
    groups: Sequence[Group],
    reward_functions: Sequence[RewardFunction | Reward | str],
    *,
    weights: Sequence[float] | None = None,
    timeout: float | None = 60.0,
    on_error: OnError = "raise",
    workers: int = 1,
) -> Scored:
    """Calls every function on every completion.

    `weights` has one per function (None: all 1). `timeout` is in seconds for each call; None sets no limit and calls
    sync functions in the calling thread. `workers` calls of sync functions run at the same time. Without functions the
    groups come back as they are. Raises `ArgumentError` for options, functions that cannot be loaded and columns that a
    function needs but a row lacks, and `RewardError` (see above).
    """
    if timeout is not None and not 0 < timeout < math.inf:
        raise ArgumentError(f"timeout must be positive seconds, or None for no limit, got {timeout}")
    if on_error not in ("raise", "drop"):
        raise ArgumentError(f"on_error must be 'raise' or 'drop', got {on_error!r}")
    if workers < 1:
        raise ArgumentError(f"workers must be at least 1, got {workers}")
    rewards = prepare(reward_functions, weights)
    if not rewards:
        return Scored(list(groups), {}, {})
    calls = [
        Call(reward.function, reward.arguments(group, rollout), f"reward-{reward.name}")
        for group in groups
        for rollout in group.rollouts
        if rollout.outcome != "failed"
        for reward in rewards
    ]
    answers = iter(call_all(calls, timeout, read=_checked, workers=workers, stop_early=on_error == "raise"))
    counts: Counter[str] = Counter({f"rewards/{why}": 0 for why in ("dropped", "raised", "timeout", "invalid")})
    sums = {reward.name: (0.0, 0) for reward in rewards}
    judged = []
    for group in groups:
        rollouts = []
        for i, rollout in enumerate(group.rollouts):
            if rollout.outcome == "failed":
                rollouts.append(rollout)
                continue
            # What the environment gave comes first.
            total, failed = sum((turn.reward for turn in rollout.turns if turn.reward is not None), 0.0), False
            remarks = [said] if (said := join_feedback([t.feedback for t in rollout.turns if t.feedback])) else []
            for reward in rewards:
                answer = next(answers)
                if answer.problem is not None:
                    if on_error == "raise":
                        where = f"{reward.name}, {group.example.source or 'an example'}, completion {i}"
                        raise RewardError(f"reward function {where}: {answer.problem}") from answer.error
                    counts[f"rewards/{answer.why}"] += 1
                    failed = True
                    continue
                value, remark = answer.value
                total += reward.weight * value
                if not rollout.by_teacher:
                    known, count = sums[reward.name]
                    sums[reward.name] = known + value, count + 1
                if remark:
                    remarks.append(remark)
            counts["rewards/dropped"] += failed
            feedback = "\n\n".join(remarks) or None
            rollouts.append(replace(rollout, reward=None if failed else total, feedback=None if failed else feedback))
        judged.append(replace(group, rollouts=tuple(rollouts)))
    if too_many := too_many_left(timeout):
        raise RewardError(too_many)
    return Scored(judged, dict(counts), sums)


@dataclass(frozen=True, eq=False)
class Reward:
    """Holds a reward function with its name and weight, and says which arguments it takes."""

    function: RewardFunction
    name: str
    weight: float = 1.0

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @cached_property
    def _needed(self) -> list[str]:
        """Lists the parameters without a default that only a column can give."""
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = self._parameters.values()
        return [p.name for p in parameters if p.default is p.empty and p.kind in named and p.name not in GIVEN]

    def arguments(self, group: Group, rollout: Trajectory) -> dict[str, Any]:
        """Returns what it is called with; what the trainer says comes before a column of the same name."""
        example = group.example
        self.check(example)
        offered = {
            **example.columns,
            "prompt": example.prompt,
            "completion": rollout.text,
            "raw_completion": rollout.text if rollout.raw_text is None else rollout.raw_text,
            "trajectory": rollout,
            "completion_ids": rollout.completion_ids.tolist(),
            "privileged_context": example.privileged_context,
        }
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values()):
            return offered
        return {name: value for name, value in offered.items() if name in self._parameters}

    def check(self, example: Example) -> None:
        """Raises `ArgumentError` for a parameter that neither the trainer nor a column of the example gives."""
        lacking = [name for name in self._needed if name not in example.columns]
        if lacking:
            trl = "; TRL gives lists of them, here it is one, and one number comes back"
            raise ArgumentError(
                f"reward function {self.name} needs {', '.join(lacking)}, which {example.source or 'the example'} does "
                f"not have: it is called for each completion with {', '.join(GIVEN)}, and the columns, "
                f"{', '.join(sorted(example.columns)) or 'none'}{trl if TRLS.intersection(lacking) else ''}"
            )


def check_columns(rewards: Sequence[Reward], *sets: Sequence[Example] | Mapping[str, Sequence[Example]] | None) -> None:
    """Raises `ArgumentError` for the first example, of these data sets, that lacks what a reward function needs."""
    for examples in sets:
        if isinstance(examples, Mapping):
            check_columns(rewards, *examples.values())
            continue
        for example in examples or ():
            for reward in rewards:
                reward.check(example)


def prepare(functions: Sequence[RewardFunction | Reward | str], weights: Sequence[float] | None = None) -> list[Reward]:
    """Loads what is named by a string, checks the rest, gives each its own name. Raises `ArgumentError`."""
    if isinstance(functions, str) or callable(functions):
        raise ArgumentError(f"reward functions must be a list, got {functions!r:.80}")
    if weights is not None and (len(weights) != len(functions) or not all(math.isfinite(w) for w in weights)):
        raise ArgumentError(f"weights must be finite, one per reward function, {len(functions)}, got {list(weights)}")
    rewards: list[Reward] = []
    for i, given in enumerate(functions):
        if isinstance(given, Reward):
            rewards.append(given)
            continue
        if not isinstance(given, str) and not callable(given):
            raise ArgumentError(f"reward function {i} must be callable or 'module:function', got {given!r:.80}")
        function = load(given) if isinstance(given, str) else given
        name = getattr(function, "__name__", type(function).__name__)
        name = name if all(name != other.name for other in rewards) else f"{name}_{i}"
        reward = Reward(function, name, 1.0 if weights is None else float(weights[i]))
        positional = [p.name for p in reward._parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
        if positional:
            raise ArgumentError(
                f"reward function {name} is called with keywords, but {positional[0]} is positional-only"
            )
        rewards.append(reward)
    return rewards


def _checked(returned: Any) -> tuple[float, str | None]:
    """Reads what a function returned: a number, or a number and a text. Raises `Invalid`."""
    value, feedback = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if isinstance(value, tuple) or not (feedback is None or isinstance(feedback, str)):
        raise Invalid(f"must return a number or (number, feedback text or None), got {returned!r:.80}")
    return read_number(value, "a number or (number, feedback)"), feedback
