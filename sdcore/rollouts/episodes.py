"""Draws trajectories: the student speaks, tools or an environment answer, and so on, until one of them is done.

    groups = play(agent, sampler, model, examples, prompts, sampling, tokenizer=tokenizer, seed=seed)

All trajectories of a batch speak at the same time, a turn each, by one call of the sampler; then all are answered. The
ids that the sampler drew are what it reads at the next turn, and what the loss sees (`contexts.conversation`). A turn
begins only where there is room for a whole one, so that no limit cuts what could have been said: `outcome` says why a
trajectory ended, and `counts` what happened to its calls.

What differs from the obvious: the first turn draws what a run without tools draws, with the same seed. Where there are
fewer trajectories left, the others' next turns are drawn otherwise than alone: batches of rows share a generator.

Not covered: keys and values that are kept from one turn to the next; an engine with a prefix cache (vLLM) does.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..contexts import join_feedback
from ..contexts.conversation import Conversation
from ..contexts.rendering import prompt_ids, template_arguments, with_context
from ..errors import ArgumentError, ContextError, SdcoreError
from ..models import find_body
from ..types import Example, Group, Message, Outcome, Trajectory, Turn
from .calls import Answer, Call, call_all, too_many_left
from .environments import Agent, Host, message_of, read_number, read_opening, read_reply, read_text
from .samplers import ModelSampler, Sampler, Sampling, check_room_of, seed_of, turns_of

# What each trajectory counts, so that a chart has its zeros.
COUNTS: Final = (
    "tools/called",
    "tools/refused",  # not there, or called with arguments that it does not take
    "tools/raised",
    "tools/timeout",
    "tools/invalid",  # returned what is neither text nor JSON
    "environment/raised",
    "environment/timeout",
    "environment/invalid",
    "history/normalised",  # turns around which the chat template would have more than was sampled
)


class EpisodeError(SdcoreError, RuntimeError):
    """Says that an environment raised, hung, or returned what it may not."""


@dataclass(eq=False)
class _Episode:
    """Holds a trajectory that goes on."""

    example: Example
    index: int  # in its group
    host: Host
    talk: Conversation | None = None
    opening: str = ""
    turns: list[Turn] = field(default_factory=list)
    outcome: Outcome | None = None  # None: it goes on
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    hangs: bool = False  # a call of its environment goes on

    @property
    def where(self) -> str:
        return f"{self.example.source or 'an example'}, trajectory {self.index}, turn {len(self.turns) // 2}"

    def failed(self, what: str, answer: Answer, agent: Agent) -> bool:
        """Ends the trajectory where its environment did not answer."""
        if answer.problem is None:
            return False
        if agent.on_error == "raise":
            raise EpisodeError(f"{self.where}: the environment's {what} {answer.problem}") from answer.error
        self.counts[f"environment/{answer.why}"] += 1
        self.outcome, self.hangs = "failed", self.hangs or answer.why == "timeout"
        return True

    def trajectory(self) -> Trajectory:
        nothing = Turn(ids=torch.zeros(0, dtype=torch.int64), text="", logprobs=torch.zeros(0), finished=False)
        turns = tuple(self.turns) or (nothing,)
        rewards = [turn.reward for turn in turns if turn.reward is not None]
        reward = sum(rewards) if rewards and self.outcome != "failed" else None
        counts = {**self.counts, "history/normalised": 0 if self.talk is None else self.talk.normalised}
        return Trajectory(
            turns=turns,
            outcome=self.outcome or "turns",
            reward=reward,
            feedback=join_feedback([turn.feedback for turn in turns if turn.feedback]) or None,
            opening=self.opening,
            counts=counts,
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
    if agent.max_tokens is not None and agent.max_tokens < sampling.max_new_tokens:
        raise ArgumentError(
            f"max_tokens must be at least those of a turn, {sampling.max_new_tokens}, got {agent.max_tokens}"
        )
    began, size = time.monotonic(), sampling.num_completions
    everyone = [_Episode(example, i, agent.host()) for example in examples for i in range(size)]
    _open(agent, everyone)
    groups_E = [everyone[start : start + size] for start in range(0, len(everyone), size)]
    prompts, opened = [], []
    for group in groups_E:
        example = opened_by(group[0].example, _one_opening(group))
        arguments = template_arguments(example, chat_template_kwargs)
        if isinstance(example.prompt, str):
            raise ContextError(f"{example.source}: the prompt must be a conversation where others answer, got text")
        ids = prompt_ids(example.prompt, tokenizer, chat_template_kwargs=arguments, source=example.source)
        options = {"arguments": arguments, "history": agent.history, "source": example.source}
        for episode in group:
            episode.talk = Conversation.begin(example.prompt, ids, tokenizer, **options)
        prompts.append(ids)
        opened.append(example)
    if isinstance(sampler, ModelSampler):
        check_room_of(model, opened, prompts, sampling.max_new_tokens)
    room = _room(agent, sampler, model, sampling)
    lengths = {id(episode): len(prompt) for group, prompt in zip(groups_E, prompts, strict=True) for episode in group}
    for number in range(agent.max_turns):
        going = [episode for episode in everyone if episode.outcome is None]
        if number and agent.max_seconds is not None and time.monotonic() - began > agent.max_seconds:
            _end(going, "time")
        if number:
            _end((e for e in going if len(_ids(e)) > room(lengths[id(e)])), "tokens")
        going = [episode for episode in going if episode.outcome is None]
        if not going:
            break
        if number:
            once = replace(sampling, num_completions=1)
            asked = [_ids(episode) for episode in going]
            drawn = sampler.sample(model, asked, **vars(once), seed=seed_of(seed, number))
            said = [turn for (turn,) in turns_of(drawn, tokenizer)]
        else:
            all_said = turns_of(sampler.sample(model, prompts, **vars(sampling), seed=seed), tokenizer)
            of_everyone = zip(everyone, (turn for turns in all_said for turn in turns), strict=True)
            said = [turn for episode, turn in of_everyone if episode.outcome is None]
        _answer(agent, list(zip(going, said, strict=True)), tokenizer, is_last=number == agent.max_turns - 1)
        if too_many := too_many_left(agent.timeout):
            raise EpisodeError(too_many)
    _judge(agent, everyone)
    for episode in everyone:
        if not episode.hangs:
            agent.release(episode.host)
    return [
        Group(example=example, prompt_ids=ids, rollouts=tuple(episode.trajectory() for episode in group))
        for example, ids, group in zip(opened, prompts, groups_E, strict=True)
    ]


def opened_by(example: Example, opening: str) -> Example:
    """Returns the example with what the environment said first at the end of its prompt."""
    return replace(example, prompt=with_context(example.prompt, lambda asked: asked + opening)) if opening else example


def _open(agent: Agent, episodes: Sequence[_Episode]) -> None:
    if agent.environment_factory is None:
        return
    calls = [episode.host.reset(episode.example) for episode in episodes]
    answers = call_all(calls, agent.timeout, read=read_opening)
    for episode, answer in zip(episodes, answers, strict=True):
        if not episode.failed("reset", answer, agent):
            episode.opening = answer.value


def _one_opening(group: Sequence[_Episode]) -> str:
    """Returns what the environments of a group said first. Raises `ContextError` where they do not say the same."""
    openings = list(dict.fromkeys(episode.opening for episode in group if episode.outcome is None))
    if len(openings) > 1:
        raise ContextError(
            f"{group[0].example.source}: reset must return the same text for all attempts at a row (seed it by the "
            f"row), got {openings[0]!r:.60} and {openings[1]!r:.60}"
        )
    for episode in group:
        episode.opening = openings[0] if openings else ""
    return openings[0] if openings else ""


def _ids(episode: _Episode) -> Tensor:
    assert episode.talk is not None  # set before the first turn
    return episode.talk.ids


def _room(agent: Agent, sampler: Sampler, model: nn.Module, sampling: Sampling) -> Any:
    """Returns what says, for the length of a prompt, up to how many ids there is room for another turn behind them."""
    positions = find_body(model).max_positions if isinstance(sampler, ModelSampler) else None
    turn = sampling.max_new_tokens

    def most(prompt_length: int) -> float:
        read = float("inf") if positions is None else positions - turn + 1  # the last token is not read
        return min(read, float("inf") if agent.max_tokens is None else prompt_length + agent.max_tokens - turn)

    return most


def _end(episodes: Iterable[_Episode], outcome: Outcome) -> None:
    for episode in episodes:
        episode.outcome = outcome


def _answer(agent: Agent, spoken: Sequence[tuple[_Episode, Turn]], tokenizer: Any, *, is_last: bool) -> None:
    """Lets tools and environments answer what was just said, and takes up who goes on."""
    steps: list[tuple[_Episode, Turn, Call]] = []
    tools: list[tuple[_Episode, Turn, str, Call | str]] = []
    for episode, said in spoken:
        if not said.finished:
            episode.turns.append(replace(said, messages=({"role": "assistant", "content": said.text},)))
            episode.outcome = "cut"
            continue
        assert episode.talk is not None
        message = message_of(said, episode.talk.text, tokenizer, agent.schemas)
        own, host = replace(said, messages=(message,)), episode.host
        requests = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        for request in requests:
            call = host.call(request.get("name"), request.get("arguments", {}))
            tools.append((episode, own, str(request.get("name")), call))
        if requests:
            episode.turns.append(own)
        elif host.steps:
            steps.append((episode, own, Call(host.environment.step, {"message": message}, "step")))
        else:
            episode.turns.append(own)
            episode.outcome = "answered"
    for episode, own, reply in _stepped(agent, steps):
        episode.outcome = "answered" if reply.done else "turns" if is_last else None
        _goes_on(episode, own, [{"role": "user", "content": reply.content}] if reply.content is not None else [])
    answers: dict[int, tuple[_Episode, Turn, list[Message]]] = {}
    for (episode, own, name, _), text in zip(tools, _texts(agent, tools), strict=True):
        answers.setdefault(id(episode), (episode, own, []))[2].append({"role": "tool", "name": name, "content": text})
    for episode, own, messages in answers.values():
        episode.outcome = "turns" if is_last else None
        _goes_on(episode, own, messages)


def _goes_on(episode: _Episode, own: Turn, messages: Sequence[Message]) -> None:
    """Takes up what was answered; what nobody will read is not rendered."""
    if messages and episode.outcome is None and episode.talk is not None:
        others, episode.talk = episode.talk.reply(own, messages)
        episode.turns.append(others)
    elif messages:
        text = "\n\n".join(str(message["content"]) for message in messages)
        nothing = torch.zeros(0, dtype=torch.int64)
        episode.turns.append(Turn(ids=nothing, text=text, raw_text="", is_own=False, messages=tuple(messages)))


def _stepped(agent: Agent, steps: Sequence[tuple[_Episode, Turn, Call]]) -> Iterable[tuple[_Episode, Turn, Any]]:
    """Yields what environments replied, and notes what they think of the turn."""
    answers = call_all([call for _, _, call in steps], agent.timeout, read=read_reply)
    for (episode, own, _), answer in zip(steps, answers, strict=True):
        if episode.failed("step", answer, agent):
            episode.turns.append(own)
            continue
        own = replace(own, reward=answer.value.reward, feedback=answer.value.feedback)
        episode.turns.append(own)
        yield episode, own, answer.value


def _texts(agent: Agent, tools: Sequence[tuple[_Episode, Turn, str, Call | str]]) -> list[str]:
    """Returns what the student is told of each call."""
    calls = [call for *_, call in tools if isinstance(call, Call)]
    answers = iter(call_all(calls, agent.timeout, read=read_text))
    texts = []
    for episode, _, _, call in tools:
        episode.counts["tools/called"] += 1
        if isinstance(call, str):
            episode.counts["tools/refused"] += 1
            texts.append(f"Error: {call}")
            continue
        answer = next(answers)
        if answer.problem is None:
            texts.append(answer.value)
            continue
        episode.counts[f"tools/{answer.why}"] += 1
        # A method of its environment that goes on must not find another trajectory there.
        episode.hangs = episode.hangs or answer.why == "timeout"
        texts.append(f"Error: the tool {answer.problem}")
    return texts


def _judge(agent: Agent, everyone: Sequence[_Episode]) -> None:
    """Asks the environments what their trajectories are worth; it goes to the student's last turn."""
    asked = [e for e in everyone if e.host.judges and e.turns and e.outcome != "failed"]
    answers = call_all(
        [Call(e.host.environment.get_reward, {}, "get_reward") for e in asked], agent.timeout, read=read_number
    )
    for episode, answer in zip(asked, answers, strict=True):
        if not episode.failed("get_reward", answer, agent):
            last = max(i for i, turn in enumerate(episode.turns) if turn.is_own)
            own = episode.turns[last]
            episode.turns[last] = replace(own, reward=(own.reward or 0.0) + answer.value)


__all__ = ["COUNTS", "EpisodeError", "opened_by", "play"]
