"""Shows a row as student and teacher will read it, and a stand-in for what the student will say, before there is one.

    seen = preview(example, collector, method, builder, reward_functions, success=True)
    seen.segments                                        # neighbouring tokens with the same part to play, in order

Where others answer the student, they are really asked: the environment's `reset` and `step` say what is shown of them,
and the student's turns are two stand-ins. So an environment that fails, or a chat template that does not keep its past,
is found here. Stand-ins call no tool: nobody knows with which arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..contexts import ContextBuilder
from ..contexts.overflow import plain_feedback
from ..contexts.rendering import answer_end
from ..prefix.planner import common_prefix
from ..presets.method import Method
from ..rollouts.rewards import judge
from ..rollouts.samplers import SampledCompletion
from ..types import Conditioned, Example, Group, Trajectory
from .collect import Collector

# Columns that may hold an answer, for the stand-in; the first that a row has.
ANSWERS: Final = ("completion", "answer", "solution", "response", "target")
UNKNOWN_ANSWER: Final = "(an answer)"
UNKNOWN_FEEDBACK: Final = "(feedback)"
TURNS: Final = 2  # of the stand-in, where others answer
COLOURS: Final = {
    "prompt": "green",
    "shared prefix": "green",
    "c_ext": "yellow",
    "student only": "blue",
    "after c_ext": "cyan",
    "completion, no loss": "dim",
    "completion, loss": "magenta",
    "others, no loss": "bright_blue",
}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Holds neighbouring tokens with the same part to play."""

    name: str  # one of COLOURS
    read_by: str  # "student", "teacher", "both", "nobody"
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Holds one row, as student and teacher will read it."""

    source: str
    segments: tuple[Segment, ...]
    prompt_tokens: int  # P
    teacher_tokens: int | None = None  # None: the method has no teacher
    shared_tokens: int = 0
    active: bool = True  # False: there is nothing privileged to show, so the completion would carry no loss
    supposed: str = ""  # what the stand-in group is, where the teacher's context depends on it
    reward: float | None = None  # of the empty attempt
    feedback: str | None = None
    opening: str = ""  # what the environment says at the end of the prompt
    ended: str = ""  # how the stand-in's trajectory did, where others answer

    @property
    def shared_fraction(self) -> float:
        """Returns the share of the student's prompt that both read."""
        return self.shared_tokens / self.prompt_tokens


def preview(
    example: Example,
    collector: Collector,
    method: Method,
    builder: ContextBuilder,
    reward_functions: Sequence[Callable[..., Any] | str],
    *,
    success: bool,
) -> Preview:
    """Previews the last completion of a group of stand-ins, of which one succeeded or none."""
    group = _stand_in(_answer_of(example), example, collector)
    answer = replace(group.rollouts[0], reward=method.success_threshold)
    rollouts: tuple[Trajectory, ...] = (answer,)
    reward, feedback, supposed = None, None, ""
    if reward_functions or method.context == "feedback":
        attempt = _stand_in("", example, replace(collector, from_data=False))
        (judged,) = judge([attempt], reward_functions).groups
        reward, feedback = (judged.rollouts[0].reward if reward_functions else None), judged.rollouts[0].feedback
        is_known = reward_functions or collector.agent is not None
        empty = replace(judged.rollouts[0], reward=-math.inf, feedback=feedback if is_known else UNKNOWN_FEEDBACK)
    if method.context == "feedback":
        success = method.use_solution and method.num_generations > 1 and (success or not method.use_feedback)
        supposed = "as if another attempt had succeeded" if success else "as if no attempt had succeeded"
        rollouts = (answer, empty) if success else (empty,)
    seen = builder.condition(replace(group, rollouts=rollouts), collector.tokenizer) if method.has_teacher else None
    student, teacher = group.prompt_ids, None if seen is None else seen.teacher_prompts[-1]
    given = group.rollouts[0].reward
    ended = f"turns {len(answer.own)}, outcome {answer.outcome}{'' if given is None else f', reward {given:g}'}"
    return Preview(
        source=example.source,
        segments=tuple(
            Segment(name=name, read_by=by, tokens=len(ids), text=text or str(collector.tokenizer.decode(ids.tolist())))
            for name, by, ids, text in _segments(student, answer, seen, method)
            if len(ids) or text
        ),
        prompt_tokens=len(student),
        active=seen is None or seen.active[-1],
        supposed=supposed,
        reward=reward,
        feedback=plain_feedback(feedback),
        opening=answer.opening,
        ended="" if collector.agent is None else ended,
        teacher_tokens=None if teacher is None else len(teacher),
        shared_tokens=0 if teacher is None else _shared(student, teacher)[0],
    )


def _segments(
    student: Tensor, rollout: Trajectory, seen: Conditioned | None, method: Method
) -> Iterator[tuple[str, str, Tensor, str]]:
    """Yields parts of a trajectory: their name, who reads them, their ids, and their text where it is not that of ids.

    Before each turn stands what its teacher reads beyond what the student has read.
    """
    by = "student" if seen is None else "both"
    of_turns = None if seen is None or seen.turns is None else iter(seen.turns[-1])
    past, start, teacher = student, 0, None if seen is None else seen.teacher_prompts[-1]
    active = seen is None or seen.active[-1]
    for turn in rollout.turns:
        if not turn.is_own:
            if turn is rollout.turns[-1]:
                yield "others, no loss", "nobody", turn.ids, turn.text
            past, start = (turn.ids, 0) if turn.restarts else (torch.cat([past, turn.ids]), len(past))
            continue
        if of_turns is not None:
            teacher = next(of_turns)
            active = teacher is not None
        if teacher is None:
            yield ("others, no loss" if start else "prompt"), by, past[start:], ""
        else:
            shared, after = _shared(past, teacher)
            common = ("others, no loss",) * 2 if start else ("shared prefix", "after c_ext")
            yield common[0], by, past[start:shared], ""
            yield "student only", "student", past[shared : len(past) - after], ""
            yield "c_ext", "teacher", teacher[shared : len(teacher) - after], ""
            yield common[1], by, past[len(past) - after :], ""
        skipped = min(method.skip_first_tokens, len(turn.ids)) if active else len(turn.ids)
        yield "completion, no loss", by, turn.ids[:skipped], ""
        yield "completion, loss", by, turn.ids[skipped:], ""
        past, start, teacher = torch.cat([past, turn.ids]), len(past) + len(turn.ids), None


def _shared(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """Returns how many tokens two prompts begin with alike, and with how many they end alike."""
    # As in a plan: the teacher's last token is computed under its own past.
    shared = min(common_prefix(student, teacher), len(teacher) - 1)
    return shared, common_prefix(student[shared:].flip(0), teacher[shared:].flip(0))


def _stand_in(text: str, example: Example, collector: Collector) -> Group:
    """Returns a group of one trajectory, in which the student says this each time; the data's where there is one."""
    ids = collector.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    end = answer_end(example.prompt, collector.tokenizer)
    ids = torch.tensor(ids if end is None else [*ids, end], dtype=torch.int64)
    said = [SampledCompletion(ids, torch.zeros(len(ids)), True)]
    sampler: Any = SimpleNamespace(sample=lambda model, prompts, **_: [said] * len(prompts))
    agent = collector.agent and replace(collector.agent, max_turns=min(TURNS, collector.agent.max_turns))
    (group,) = replace(collector, sampler=sampler, agent=agent).draw(nn.Identity(), [example], seed=0)
    return group


def _answer_of(example: Example) -> str:
    columns = {**example.columns, "privileged_context": example.privileged_context}
    for name in (*ANSWERS, "privileged_context"):
        value = columns.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return UNKNOWN_ANSWER
