"""Calls reward functions: what they are given, what they may return, and what becomes of one that fails or hangs.

    def exact(*, completion: str, answer: str, **columns) -> float | tuple[float, str | None]:
        right = completion.strip() == answer
        return (1.0, None) if right else (0.0, f"The answer is not {completion!r}.")

    groups = score(groups, ["rewards.py:exact"], timeout=10)

A function is called once per completion with keywords: `prompt`, `completion`, `raw_completion`, `completion_ids`,
`privileged_context` and every other column of the example; one without `**columns` gets those that it names. Of special
tokens `completion` has tags that open and close alone, such as `<think>` and `</think>`; `raw_completion` has them all,
the end too. It may be `async`. The second thing that it may return is feedback about this very completion, which SDPO
shows to the teacher. With several functions the reward is the weighted sum, and the feedback is that of all of them.

What a function gets wrong has one of two outcomes, whatever it was: an exception, NaN, infinity, None, something that
is no number, more than `timeout` seconds. With `on_error="raise"` it stops the run as a `RewardError` that names
function and row; with "drop" the completion's reward is None, so that it carries no loss, and it is counted.

What differs from the obvious: **a thread cannot be killed.** A function that hangs is left behind in a daemon thread
and reported, but goes on using what it uses until the process ends; when 16 are left behind, the run stops in either
case. Code that may hang belongs in a process of its own (`rollouts.sandbox.run_limited`). Functions are called one
after the other unless `workers` says that they may run at the same time; async ones always may.

Not covered: rewards for parts of a completion, and reward models that want batches.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ..errors import ArgumentError, SdcoreError
from ..types import Example, Group, Trajectory
from .named import load

RewardFunction: TypeAlias = Callable[..., Any]
OnError: TypeAlias = Literal["raise", "drop"]

# What every function may ask for, beside the row's columns; and what TRL calls them.
GIVEN: Final = ("completion", "prompt", "privileged_context", "raw_completion", "completion_ids")
TRLS: Final = frozenset({"prompts", "completions"})
MOST_LEFT_BEHIND: Final = 16  # hung threads after which going on only makes it worse
MOST_AT_ONCE: Final = 64  # async calls in flight
GRACE_SECONDS: Final = 1.0  # for an event loop to notice that a call is too late


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


def score(
    groups: Sequence[Group],
    reward_functions: Sequence[RewardFunction | Reward | str],
    *,
    weights: Sequence[float] | None = None,
    timeout: float | None = 60.0,
    on_error: OnError = "raise",
    workers: int = 1,
) -> list[Group]:
    """Returns the groups of `judge`, without its counts."""
    return judge(groups, reward_functions, weights=weights, timeout=timeout, on_error=on_error, workers=workers).groups


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
        _Call(reward, group, i, reward.arguments(group, group.rollouts[i]))
        for group in groups
        for i in range(len(group.rollouts))
        for reward in rewards
    ]
    answers = _answers(calls, timeout, workers, stop_early=on_error == "raise")
    counts: Counter[str] = Counter({f"rewards/{why}": 0 for why in ("dropped", "raised", "timeout", "invalid")})
    sums = {reward.name: (0.0, 0) for reward in rewards}
    judged, given = [], iter(zip(calls, answers, strict=True))
    for group in groups:
        rollouts = []
        for rollout in group.rollouts:
            total, remarks, failed = 0.0, [], False
            for reward in rewards:
                call, answer = next(given)
                if answer.problem is not None:
                    if on_error == "raise":
                        raise RewardError(f"{call.where}: {answer.problem}") from answer.error
                    counts[f"rewards/{answer.why}"] += 1
                    failed = True
                    continue
                total += reward.weight * answer.value
                if not rollout.by_teacher:
                    known, count = sums[reward.name]
                    sums[reward.name] = known + answer.value, count + 1
                if answer.feedback:
                    remarks.append(answer.feedback)
            counts["rewards/dropped"] += failed
            feedback = "\n\n".join(remarks) or None
            rollouts.append(replace(rollout, reward=None if failed else total, feedback=None if failed else feedback))
        judged.append(replace(group, rollouts=tuple(rollouts)))
    if _left_behind() >= MOST_LEFT_BEHIND:
        raise RewardError(
            f"{_left_behind()} calls of reward functions still run after their {timeout:g} seconds; they cannot be "
            "killed, so the run stops. Give the function a limit of its own, such as rollouts.sandbox.run_limited"
        )
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

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004  # the method of an object, not whether there is one
        )

    def arguments(self, group: Group, rollout: Trajectory) -> dict[str, Any]:
        """Returns what it is called with; what the trainer says comes before a column of the same name."""
        example = group.example
        self.check(example)
        offered = {
            **example.columns,
            "prompt": example.prompt,
            "completion": rollout.text,
            "raw_completion": rollout.text if rollout.raw_text is None else rollout.raw_text,
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


@dataclass(frozen=True, eq=False)
class _Call:
    reward: Reward
    group: Group
    index: int
    arguments: dict[str, Any]

    @property
    def where(self) -> str:
        return (
            f"reward function {self.reward.name}, {self.group.example.source or 'an example'}, completion {self.index}"
        )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    value: float = 0.0
    feedback: str | None = None
    problem: str | None = None
    why: Literal["raised", "timeout", "invalid"] = "invalid"
    error: BaseException | None = None


def _checked(returned: Any) -> _Answer:
    """Reads what a function returned: a number, or a number and a text."""
    feedback = None
    value = returned
    if isinstance(returned, tuple):
        if len(returned) != 2 or not (returned[1] is None or isinstance(returned[1], str)):
            return _Answer(problem=f"must return a number or (number, feedback text or None), got {returned!r:.80}")
        value, feedback = returned
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a 0-d tensor or array
    if not isinstance(value, numbers.Real):
        return _Answer(problem=f"must return a number or (number, feedback), got {returned!r:.80}")
    if not math.isfinite(value):
        return _Answer(problem=f"must return a finite number, got {float(value)}")
    return _Answer(value=float(value), feedback=feedback)


def _raised(error: BaseException) -> _Answer:
    return _Answer(problem=f"raised {type(error).__name__}: {error}", why="raised", error=error)


def _late(timeout: float) -> _Answer:
    return _Answer(problem=f"did not return within {timeout:g} seconds", why="timeout")


def _answers(calls: Sequence[_Call], timeout: float | None, workers: int, *, stop_early: bool) -> list[_Answer]:
    """Returns answers in the order of the calls. With `stop_early` nothing is called after a sync one has failed."""
    answers: list[_Answer | None] = [None] * len(calls)
    waiting = [i for i, call in enumerate(calls) if call.reward.is_async]
    for i, answer in zip(waiting, _await_all([calls[i] for i in waiting], timeout), strict=True):
        answers[i] = answer
    todo = [i for i, call in enumerate(calls) if not call.reward.is_async]
    if workers == 1 or len(todo) <= 1:
        for i in todo:
            answers[i] = _call(calls[i], timeout)
            if stop_early and answers[i].problem is not None:  # type: ignore[union-attr]  # set the line before
                break
    else:
        # Daemons, unlike an executor's threads: a function that hangs must not keep the process from ending.
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in todo:
            left.put(i)

        def lane() -> None:
            while True:
                try:
                    i = left.get_nowait()
                except queue.Empty:
                    return
                answers[i] = _call(calls[i], timeout)

        lanes = [threading.Thread(target=lane, daemon=True) for _ in range(min(workers, len(todo)))]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
    return [answer or _Answer(problem="was not called") for answer in answers]


# Threads that were given up, as long as they run.
_ABANDONED: list[threading.Thread] = []


def _left_behind() -> int:
    _ABANDONED[:] = [thread for thread in _ABANDONED if thread.is_alive()]
    return len(_ABANDONED)


def _call(call: _Call, timeout: float | None) -> _Answer:
    """Makes one sync call, in a thread of its own if it has a time limit."""
    answers: list[_Answer] = []

    def run() -> None:
        try:
            answers.append(_checked(call.reward.function(**call.arguments)))
        except Exception as error:
            answers.append(_raised(error))

    if timeout is None:
        run()
        return answers[0]
    # Not a pool: its threads are joined when the process ends, and a hung one would keep it from ending.
    thread = threading.Thread(target=run, daemon=True, name=f"reward-{call.reward.name}")
    thread.start()
    thread.join(timeout)
    if thread.is_alive() and not answers:
        _ABANDONED.append(thread)
        return _late(timeout)
    return answers[0] if answers else _Answer(problem="ended its thread", why="raised")


def _await_all(calls: Sequence[_Call], timeout: float | None) -> list[_Answer]:
    """Makes async calls, some at a time, in an event loop of their own thread: the caller may have one already."""
    if not calls:
        return []
    answers: list[_Answer | None] = [None] * len(calls)

    async def one(i: int, call: _Call, turn: asyncio.Semaphore) -> None:
        async with turn:
            try:
                answers[i] = _checked(await asyncio.wait_for(call.reward.function(**call.arguments), timeout))
            except TimeoutError as error:
                # Its own TimeoutError is an exception like another.
                answers[i] = _late(timeout) if timeout is not None else _raised(error)
            except Exception as error:
                answers[i] = _raised(error)

    async def everything() -> None:
        turn = asyncio.Semaphore(MOST_AT_ONCE)
        await asyncio.gather(*(one(i, call, turn) for i, call in enumerate(calls)))

    thread = threading.Thread(target=lambda: asyncio.run(everything()), daemon=True, name="rewards-async")
    thread.start()
    # A call that blocks its loop keeps all others from being noticed late, too.
    rounds = -(-len(calls) // MOST_AT_ONCE)
    thread.join(None if timeout is None else rounds * timeout + GRACE_SECONDS)
    if thread.is_alive():
        _ABANDONED.append(thread)
    blocked = _late(timeout) if timeout is not None else _Answer(problem="was never finished", why="raised")
    return [answer or blocked for answer in answers]
