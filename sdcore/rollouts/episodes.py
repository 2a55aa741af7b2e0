"""Draws trajectories: the student speaks, tools or an environment answer, and so on, until one of them is done.

    groups = play(agent, sampler, model, examples, sampling, tokenizer=tokenizer, seed=seed)

All trajectories of a batch speak at the same time, a turn each, by one call of the sampler; then all are answered. The
first turn is drawn as in a run without tools, with the same seed. A turn begins only where there is room for a whole
one, so that no limit cuts what could have been said: `outcome` says why a trajectory ended, `counts` what became of its
calls. The model itself keeps keys and values from one turn to the next, as an engine with a prefix cache does.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn

from ..contexts import join_feedback
from ..contexts.conversation import Conversation
from ..contexts.rendering import prompt_ids, template_arguments, with_context
from ..errors import ArgumentError, ContextError, SdcoreError
from ..models import find_body
from ..types import Example, Group, Message, Outcome, Trajectory, Turn
from .calls import Call, call_all, read_number, too_many_left
from .environments import Agent, Host, Reply, message_of, read_opening, read_reply, read_result
from .rewards import OnError
from .samplers import ModelSampler, Sampler, Sampling, check_room_of, seed_of, turns_of

# What each trajectory counts, so that a chart has its zeros. Refused: no such tool, or not with such arguments;
# invalid: what it returned; normalised: turns around which the chat template would have more than was sampled.
COUNTS: Final = (
    *(f"{whose}/{why}" for whose in ("tools", "environment") for why in ("raised", "timeout", "invalid")),
    *("tools/called", "tools/refused", "history/normalised", "history/refused"),
)


class EpisodeError(SdcoreError, RuntimeError):
    """Says that an environment raised, hung, or returned what it may not."""


@dataclass(eq=False)
class _Episode:
    """Holds a trajectory that goes on."""

    example: Example
    index: int  # in its group
    host: Host
    talk: Conversation = field(init=False)
    room: float = 0.0  # up to how many ids a whole turn fits behind them
    opening: str = ""
    turns: list[Turn] = field(default_factory=list)
    outcome: Outcome | None = None  # None: it goes on
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    hangs: bool = False  # a call of its environment has not come back

    def hear(self, messages: Sequence[Message], outcome: Outcome | None, on_error: OnError) -> None:
        """Takes up what was answered to the last turn; what nobody will read is not rendered."""
        self.outcome = outcome
        if messages and outcome is None:
            try:
                others, self.talk = self.talk.reply(self.turns[-1], messages)
                self.turns.append(others)
            except ContextError:
                if on_error == "raise":
                    raise
                self.counts["history/refused"] += 1
                self.outcome = "failed"
        elif messages:
            text = "\n\n".join(str(message["content"]) for message in messages)
            nothing = torch.zeros(0, dtype=torch.int64)
            self.turns.append(Turn(ids=nothing, text=text, raw_text="", is_own=False, messages=tuple(messages)))

    def credit(self, reward: float | None, feedback: str | None = None) -> None:
        """Adds to the reward of the student's last turn, and to the feedback on it."""
        last = -1 if self.turns[-1].is_own else -2
        own = self.turns[last]
        said = join_feedback([text for text in (own.feedback, feedback) if text]) or None
        rewards = [value for value in (own.reward, reward) if value is not None]
        self.turns[last] = replace(own, reward=sum(rewards) if rewards else None, feedback=said)

    def trajectory(self) -> Trajectory:
        nothing = Turn(ids=torch.zeros(0, dtype=torch.int64), text="", logprobs=torch.zeros(0), finished=False)
        turns = tuple(self.turns) or (nothing,)
        rewards = [turn.reward for turn in turns if turn.reward is not None]
        return Trajectory(
            turns=turns,
            outcome=self.outcome or "turns",
            reward=sum(rewards) if rewards and self.outcome != "failed" else None,
            feedback=join_feedback([turn.feedback for turn in turns if turn.feedback]) or None,
            opening=self.opening,
            counts={**self.counts, "history/normalised": self.talk.normalised},
        )


def play(
    agent: Agent,
    sampler: Sampler,
    model: nn.Module,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    tokenizer: Any,
    seed: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Group]:
    """Draws trajectories of each example, not judged yet but by their environments.

    Raises `EpisodeError`, `ContextError` for prompts and templates, and what the sampler raises.
    """
    began, turn = time.monotonic(), sampling.max_new_tokens
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if agent.max_tokens is not None and agent.max_tokens < turn:
        raise ArgumentError(f"max_tokens must be at least those of a turn, {turn}, got {agent.max_tokens}")
    groups = [[_Episode(row, i, agent.host()) for i in range(sampling.num_completions)] for row in examples]
    everyone = [episode for group in groups for episode in group]
    resets = [
        (episode, episode.host.reset(episode.example)) for episode in everyone if episode.host.environment is not None
    ]
    for episode, opening in _asked(agent, resets, read_opening):
        episode.opening = opening
    own_limit = None
    if isinstance(sampler, ModelSampler):
        sampler, own_limit = sampler.session(), find_body(model).max_positions
    for group in groups:
        _begin(agent, group, tokenizer, chat_template_kwargs)
        length = len(group[0].talk.ids)
        most = min(length + (agent.max_tokens or math.inf), math.inf if own_limit is None else own_limit + 1)
        for episode in group:
            episode.room = most - turn  # of the model's positions the last token needs none
    opened, prompts = [group[0].example for group in groups], [group[0].talk.ids for group in groups]
    if own_limit is not None:
        check_room_of(model, opened, prompts, turn)
    for number in range(agent.max_turns):
        late = bool(number) and agent.max_seconds is not None and time.monotonic() - began > agent.max_seconds
        for episode in everyone if number else ():
            if episode.outcome is None and (late or len(episode.talk.ids) > episode.room):
                episode.outcome = "time" if late else "tokens"
        going = [episode for episode in everyone if episode.outcome is None]
        if not going:
            break
        options = vars(sampling) | ({"num_completions": 1} if number else {})
        read = [episode.talk.ids for episode in going] if number else prompts
        drawn = sampler.sample(model, read, **options, seed=seed_of(seed, number) if number else seed)
        said = [each for turns in turns_of(drawn, tokenizer) for each in turns]
        spoken = list(zip(going if number else everyone, said, strict=True))
        _answer(agent, [pair for pair in spoken if pair[0].outcome is None], number == agent.max_turns - 1)
        if too_many := too_many_left(agent.timeout):
            raise EpisodeError(too_many)
    judges = [e for e in everyone if e.turns and e.outcome != "failed" and hasattr(e.host.environment, "get_reward")]
    asked = [(episode, Call(episode.host.environment.get_reward, {}, "get_reward")) for episode in judges]
    for episode, reward in _asked(agent, asked, read_number):
        episode.credit(reward)
    for episode in everyone:
        if not episode.hangs:
            agent.release(episode.host)
    return [
        Group(example=example, prompt_ids=ids, rollouts=tuple(episode.trajectory() for episode in group))
        for example, ids, group in zip(opened, prompts, groups, strict=True)
    ]


def opened_by(example: Example, opening: str) -> Example:
    """Returns the example with what the environment said first at the end of its prompt."""
    return replace(example, prompt=with_context(example.prompt, lambda asked: asked + opening)) if opening else example


def _begin(agent: Agent, group: Sequence[_Episode], tokenizer: Any, kwargs: Mapping[str, Any] | None) -> None:
    """Lets the trajectories of a row begin with its prompt. Raises `ContextError`."""
    row = group[0].example
    if isinstance(row.prompt, str):
        raise ContextError(f"{row.source}: the prompt must be a conversation where others answer, got text")
    openings = list(dict.fromkeys(episode.opening for episode in group if episode.outcome is None)) or [""]
    if len(openings) > 1:
        raise ContextError(
            f"{row.source}: reset must return the same text for all attempts at a row (seed it by the row), got "
            f"{openings[0]!r:.60} and {openings[1]!r:.60}"
        )
    row = opened_by(row, openings[0])
    messages: Any = row.prompt
    arguments = template_arguments(row, kwargs)
    ids = prompt_ids(row.prompt, tokenizer, chat_template_kwargs=arguments, source=row.source)
    options = {"arguments": arguments, "history": agent.history, "source": row.source}
    for episode in group:
        episode.example, episode.opening = row, openings[0]
        episode.talk = Conversation.begin(messages, ids, tokenizer, **options)


def _asked(
    agent: Agent, calls: Sequence[tuple[_Episode, Call]], read: Callable[[Any], Any]
) -> Iterator[tuple[_Episode, Any]]:
    """Yields what environments answered, and ends the trajectories of those that did not."""
    answers = call_all([call for _, call in calls], agent.timeout, read=read)
    for (episode, call), answer in zip(calls, answers, strict=True):
        if answer.problem is None:
            yield episode, answer.value
            continue
        if agent.on_error == "raise":
            where = (
                f"{episode.example.source or 'an example'}, trajectory {episode.index}, turn {len(episode.turns) // 2}"
            )
            raise EpisodeError(f"{where}: the environment's {call.name} {answer.problem}") from answer.error
        episode.counts[f"environment/{answer.why}"] += 1
        episode.outcome, episode.hangs = "failed", episode.hangs or answer.why == "timeout"


def _answer(agent: Agent, spoken: Iterable[tuple[_Episode, Turn]], is_last: bool) -> None:
    """Lets tools and environments answer what was just said, and says who goes on."""
    steps: list[tuple[_Episode, Call]] = []
    tools: list[tuple[_Episode, str, Call | str]] = []
    for episode, said in spoken:
        message: Message = {"role": "assistant", "content": said.text}
        if said.finished:
            message = message_of(said, episode.talk.text, episode.talk.tokenizer, agent.schemas)
        episode.turns.append(replace(said, messages=(message,)))
        requests = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        for request in requests:
            call = episode.host.call(request.get("name"), request.get("arguments", {}))
            tools.append((episode, str(request.get("name")), call))
        if not said.finished:
            episode.outcome = "cut"
        elif not requests and episode.host.steps:
            steps.append((episode, Call(episode.host.environment.step, {"message": message}, "step")))
        elif not requests:
            episode.outcome = "answered"
    told: dict[_Episode, list[Message]] = {}
    over: set[_Episode] = set()
    of_steps = ((episode, {"role": "user"}, reply) for episode, reply in _asked(agent, steps, read_reply))
    for episode, who, reply in (*of_steps, *_replies(agent, tools)):
        episode.credit(reply.reward, reply.feedback)
        told.setdefault(episode, []).extend([] if reply.content is None else [{**who, "content": reply.content}])
        over |= {episode} if reply.done else set()
    for episode, messages in told.items():
        episode.hear(messages, "answered" if episode in over else "turns" if is_last else None, agent.on_error)


def _replies(
    agent: Agent, tools: Sequence[tuple[_Episode, str, Call | str]]
) -> Iterator[tuple[_Episode, dict[str, str], Reply]]:
    """Yields what the student is told of each call, and by whom."""
    answers = iter(call_all([call for *_, call in tools if isinstance(call, Call)], agent.timeout, read=read_result))
    for episode, name, call in tools:
        if isinstance(call, str):
            reply, why = Reply(f"Error: {call}"), "refused"
        else:
            answer = next(answers)
            reply = answer.value if answer.problem is None else Reply(f"Error: the tool {answer.problem}", failed=True)
            why = "raised" if answer.problem is None else answer.why
        episode.counts.update(["tools/called", *([f"tools/{why}"] if why == "refused" or reply.failed else [])])
        # A method of its environment that goes on must not find another trajectory there.
        episode.hangs = episode.hangs or why == "timeout"
        yield episode, {"role": "tool", "name": name}, reply


__all__ = ["COUNTS", "EpisodeError", "opened_by", "play"]
