"""Trajectories: the ids that were drawn are read and learned, whatever the template does to the past."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sdcore.errors import ArgumentError, ContextError
from sdcore.rollouts.environments import Agent, Reply
from sdcore.rollouts.episodes import EpisodeError
from sdcore.types import Example, Trajectory
from tests.sdcore.rollouts.talks import CALL, QUESTION, Higher, Says, add, learned, run, tokenizer_of

THINKING = ["<think>\nIs it  five?\n</think>\n\nFive .", "<think>\nno.\n</think>\n\nSix\t!", "Seven"]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("smollm2", THINKING),
        ("qwen3_training", [*THINKING[:2], "<think>\n\n</think>\n\nSeven"]),
        ("qwen3", ["Five", "Six", "Seven"]),
        ("llama3", THINKING),
        ("gemma3", THINKING),
        ("deepseek_r1_distill_training", ["is it five?\n</think>\n\nFive", "no\n</think>Six", "Seven"]),
    ],
)
def test_the_ids_that_were_drawn_are_read_and_learned_at_every_turn(name: str, texts: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    sampler = Says(tokenizer, *texts)
    group = run(Agent(environment_factory=Higher), sampler)
    (rollout,) = group.rollouts
    assert rollout.outcome == "answered"
    assert [turn.ids.tolist() for turn in rollout.own] == sampler.drawn == learned(group)
    assert rollout.logprobs is not None
    assert torch.equal(
        rollout.logprobs, torch.cat([-torch.arange(len(ids)) - 100.0 * (i + 1) for i, ids in enumerate(sampler.drawn)])
    )
    # What is read is what was read and drawn before, and the difference that the reply makes.
    for t in (1, 2):
        past = [*sampler.read[t - 1], *sampler.drawn[t - 1]]
        assert sampler.read[t][: len(past)] == past
        reply = tokenizer.decode(sampler.read[t][len(past) :])
        assert f"Guess {t} is too low." in reply
    # The template makes the same text of the conversation, up to white space.
    messages = [*QUESTION.prompt]
    for t in (0, 1):
        opened = "<think>\n" if name.startswith("deepseek") else ""
        messages += [{"role": "assistant", "content": opened + texts[t]}, *rollout.turns[2 * t + 1].messages]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "".join(whole.split()) == "".join(tokenizer.decode(sampler.read[2]).split())
    assert [turn.reward for turn in rollout.own] == [-0.5, -0.5, 1.0]
    assert rollout.reward == 0.0
    assert rollout.own[0].feedback == "It is 1 higher."
    assert rollout.turns[-1].text == "That is it."  # nobody reads it: it has no ids
    assert len(rollout.turns[-1].ids) == 0


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "llama3", "smollm2"])
def test_a_tool_s_answer_is_the_difference_that_it_makes(name: str) -> None:
    tokenizer = tokenizer_of(name)
    sampler = Says(tokenizer, f"<think>\nadd\n</think>\n\n{CALL}", "<think>\nso\n</think>\n\nSeven.")
    group = run(Agent(tools=[add]), sampler)
    (rollout,) = group.rollouts
    assert rollout.outcome == "answered"
    assert rollout.counts["tools/called"] == 1
    assert [turn.ids.tolist() for turn in rollout.own] == sampler.drawn == learned(group)
    assert rollout.turns[1].messages == ({"role": "tool", "name": "add", "content": "7"},)
    past = [*sampler.read[0], *sampler.drawn[0]]
    assert sampler.read[1][: len(past)] == past
    assert "7" in tokenizer.decode(sampler.read[1][len(past) :])
    assert rollout.own[0].messages[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 3, "b": 4}}


@pytest.mark.parametrize(
    ("name", "text", "kwargs"),
    [
        ("qwen3", "<think>\nfive?\n</think>\n\nFive", {}),
        ("qwen3", "Five", {"enable_thinking": False}),
        ("deepseek_r1_distill", "five?</think>Five", {}),
    ],
)
def test_a_template_that_does_not_keep_its_past_is_refused_or_followed(
    name: str, text: str, kwargs: dict[str, Any]
) -> None:
    tokenizer = tokenizer_of(name)
    with pytest.raises(
        ContextError, match=r"rows:1: where the student read or said '.*does not keep its past.*history="
    ):
        run(Agent(environment_factory=Higher), Says(tokenizer, text), chat_template_kwargs=kwargs)
    sampler = Says(tokenizer, text)
    group = run(Agent(environment_factory=Higher, history="as_rendered"), sampler, chat_template_kwargs=kwargs)
    (rollout,) = group.rollouts
    assert learned(group) == sampler.drawn
    # Each turn is learned after exactly what the template renders of the conversation before it.
    messages = [*QUESTION.prompt]
    read = []
    for t in range(3):
        if t:
            messages += [*rollout.own[t - 1].messages, *rollout.turns[2 * t - 1].messages]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **kwargs)
        read.append(list(rendered["input_ids"]))
    assert sampler.read == read
    sequences = rollout.sequences(group.prompt_ids)
    assert [len(starts) for _, starts in sequences] == [1, 1, 1]
    assert [ids[: starts[0]].tolist() for ids, starts in sequences] == read


def test_a_template_that_keeps_its_past_is_one_sequence_as_rendered_too() -> None:
    tokenizer = tokenizer_of("qwen3_training")
    text = "<think>\n\n</think>\n\nlow"
    sampler = Says(tokenizer, text)
    sampler.ids_of = lambda said: tokenizer(said, add_special_tokens=False)["input_ids"]  # type: ignore
    rollout = run(Agent(environment_factory=Higher, history="as_rendered"), sampler).rollouts[0]
    assert [turn.restarts for turn in rollout.turns] == [False] * 6


def test_an_answer_that_ends_with_another_token_is_ended_by_the_template() -> None:
    tokenizer = tokenizer_of("smollm2")
    sampler = Says(tokenizer, "Five")
    end, other = tokenizer.eos_token_id, tokenizer.pad_token_id
    drawn = sampler.sample
    sampler.sample = lambda *a, **k: [  # type: ignore[method-assign]
        [one._replace(ids=torch.where(one.ids == end, other, one.ids)) for one in group] for group in drawn(*a, **k)
    ]
    rollout = run(Agent(environment_factory=Higher), sampler).rollouts[0]
    assert int(rollout.turns[0].ids[-1]) == other
    assert int(rollout.turns[1].ids[0]) == end


def test_limits_are_told_apart_and_leave_whole_turns() -> None:
    tokenizer = tokenizer_of("smollm2")

    def outcome(sampler: Says | None = None, **limits: Any) -> Trajectory:
        return run(Agent(environment_factory=Higher, **limits), sampler or Says(tokenizer, "Five")).rollouts[0]

    assert outcome(max_turns=2).outcome == "turns"
    assert len(outcome(max_turns=2).own) == 2
    room = outcome(max_tokens=64)
    assert (room.outcome, len(room.own)) == ("tokens", 1)
    assert not room.finished
    cut = outcome(Says(tokenizer, "Five", cut=True))
    assert (cut.outcome, len(cut.own)) == ("cut", 1)

    class Slow(Higher):
        def step(self, message: Any) -> str:
            time.sleep(0.05)
            return "on"

    late = run(Agent(environment_factory=Slow, max_seconds=0.02), Says(tokenizer, "Five")).rollouts[0]
    assert (late.outcome, len(late.own)) == ("time", 1)
    with pytest.raises(ArgumentError, match=r"max_tokens must be at least .*64, got 63"):
        outcome(max_tokens=63)


def test_trajectories_go_on_together_and_end_apart() -> None:
    tokenizer = tokenizer_of("smollm2")

    class Some(Higher):
        made = 0

        def __init__(self) -> None:
            Some.made += 1

        def step(self, message: dict[str, Any]) -> str | None:
            return None if message["content"] == "stop" else "more"

    sampler = Says(tokenizer, lambda i: "stop" if i == 1 else "go", lambda i: "stop")
    agent = Agent(environment_factory=Some)
    group = run(agent, sampler, count=3)
    assert [len(rollout.own) for rollout in group.rollouts] == [2, 1, 2]
    assert len(sampler.read) == 5
    assert sampler.seeds[0] == 5  # what a run of single answers draws with
    assert len(set(sampler.seeds)) == 2
    run(agent, Says(tokenizer, "stop"), count=3)
    assert Some.made == 3  # made once, reset often


def test_the_environment_s_first_words_are_the_end_of_the_prompt() -> None:
    tokenizer = tokenizer_of("smollm2")
    example = Example(prompt=QUESTION.prompt, columns={"opening": " From 1 to 9."}, source="rows:1")
    group = run(Agent(environment_factory=Higher), Says(tokenizer, "Five"), example, count=2)
    assert group.example.prompt == ({"role": "user", "content": "Guess! From 1 to 9."},)
    assert "Guess! From 1 to 9.<|im_end|>" in tokenizer.decode(group.prompt_ids)
    assert [rollout.opening for rollout in group.rollouts] == [" From 1 to 9."] * 2

    class Random(Higher):
        made = 0

        def reset(self, **row: Any) -> str:  # type: ignore[override]
            Random.made += 1
            return f"{row['prompt']} {Random.made}"

    with pytest.raises(ContextError, match="rows:1: reset must return the same text for all attempts"):
        run(Agent(environment_factory=Random), Says(tokenizer, "Five"), count=2)


class Counter:
    """TRL's own example of an environment: its methods are tools, and `reset` takes nothing."""

    def reset(self) -> None:
        self._counter = 0

    def increment(self, a: int) -> int:
        """
        Increments the counter.

        Args:
            a: by how much
        """
        self._counter += a
        return self._counter

    async def get_reward(self) -> float:
        await asyncio.sleep(0)
        return float(self._counter)


def test_an_environment_as_trl_takes_it() -> None:
    tokenizer = tokenizer_of("qwen3_training")
    call = '<think>\n\n</think>\n\n<tool_call>\n{"name": "increment", "arguments": {"a": 2}}\n</tool_call>'
    agent = Agent(environment_factory=Counter)
    assert [schema["function"]["name"] for schema in agent.schemas] == ["increment"]
    group = run(agent, Says(tokenizer, call, call, "<think>\n\n</think>\n\ndone"), count=2)
    assert [[turn.text for turn in rollout.turns if not turn.is_own] for rollout in group.rollouts] == [["2", "4"]] * 2
    assert [rollout.reward for rollout in group.rollouts] == [4.0, 4.0]


def tool(returned: Any) -> Callable[[], Any]:
    def look() -> Any:
        """Looks."""
        return returned() if callable(returned) else returned

    return look


def fails() -> Any:
    raise ValueError("no such page")


@pytest.mark.parametrize(
    ("returned", "count", "told"),
    [
        (fails, "tools/raised", "Error: the tool raised ValueError: no such page"),
        (lambda: time.sleep(0.5), "tools/timeout", "Error: the tool did not return within 0.05 seconds"),
        (object(), "tools/invalid", "Error: the tool must return a text or what JSON has, got <object"),
        (Reply("no such page", failed=True), "tools/raised", "no such page"),
        (Reply(7), "tools/invalid", "Error: the tool must return a text, a Reply or None, got 7"),  # type: ignore[arg-type]
        ({"a": [1.5, None]}, None, '{"a": [1.5, null]}'),
        ("text", None, "text"),
    ],
)
def test_what_a_tool_does_wrong_is_told_and_counted(returned: Any, count: str | None, told: str) -> None:
    tokenizer = tokenizer_of("smollm2")
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    rollout = run(Agent(tools=[tool(returned)], timeout=0.05), Says(tokenizer, call, "end")).rollouts[0]
    assert rollout.turns[1].text.startswith(told)
    assert {name for name, number in rollout.counts.items() if number} == {"tools/called"} | (
        {count} if count else set()
    )
    assert rollout.outcome == "answered"


def test_a_tool_may_end_the_trajectory_and_say_what_the_turn_was_worth() -> None:
    replies = iter([Reply("warm", reward=0.5, feedback="It is near."), Reply("found", done=True, reward=2.0)])
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    sampler = Says(tokenizer_of("smollm2"), call, f"{call}{CALL}", "never said")
    rollout = run(Agent(tools=[tool(lambda: next(replies)), add]), sampler).rollouts[0]
    assert [turn.text for turn in rollout.turns] == [call, "warm", f"{call}{CALL}", "found\n\n7"]
    assert [(turn.reward, turn.feedback) for turn in rollout.own] == [(0.5, "It is near."), (2.0, None)]
    assert (rollout.outcome, rollout.reward, rollout.turns[-1].ids.tolist()) == ("answered", 2.5, [])
    wordless = run(Agent(tools=[tool(Reply(None, reward=1.0))]), Says(tokenizer_of("smollm2"), call)).rollouts[0]
    assert (len(wordless.turns), wordless.outcome, wordless.reward) == (1, "answered", 1.0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('{"name": "sub", "arguments": {}}', "Error: there is no tool 'sub', there are add"),
        ('{"name": "add", "parameters": {"a": 1}}', "Error: add: missing a required argument: 'b'"),
        ('{"name": "add", "arguments": [1, 2]}', "Error: add takes its arguments as an object, got [1, 2]"),
        ('{"name": "add", "parameters": "{\\"a\\": 1, \\"b\\": 1}"}', "2"),
    ],
)
def test_a_call_that_does_not_fit_is_told_so(call: str, told: str) -> None:
    rollout = run(Agent(tools=[add]), Says(tokenizer_of("smollm2"), call, "end")).rollouts[0]
    assert rollout.turns[1].text == told
    assert rollout.counts["tools/refused"] == (told != "2")


def test_two_calls_in_a_turn_are_two_messages_of_one_turn() -> None:
    rollout = run(Agent(tools=[add]), Says(tokenizer_of("qwen3_training"), f"{CALL}\n{CALL}", "end")).rollouts[0]
    assert [message["content"] for message in rollout.turns[1].messages] == ["7", "7"]
    assert len(rollout.turns) == 3


def test_a_past_that_is_not_kept_ends_the_trajectory_where_errors_drop_it() -> None:
    sampler = Says(tokenizer_of("qwen3_training"), lambda i: "a</think>b</think>c" if i == 1 else "Five")
    group = run(Agent(environment_factory=Higher, on_error="drop"), sampler, count=3)
    assert [rollout.outcome for rollout in group.rollouts] == ["answered", "failed", "answered"]
    assert [rollout.counts["history/refused"] for rollout in group.rollouts] == [0, 1, 0]
    assert len(group.rollouts[1].turns) == 1


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"name": {}}', "<tool_call>{</tool_call>", '{"name": "add", "arguments": "{"}']
)
def test_nothing_that_a_student_writes_stops_a_run(text: str) -> None:
    rollout = run(Agent(tools=[add], max_turns=1), Says(tokenizer_of("smollm2"), text), most=200_000).rollouts[0]
    assert rollout.outcome in ("answered", "turns")


def test_what_the_template_would_put_around_an_answer_is_left_out_and_counted() -> None:
    sampler = Says(tokenizer_of("qwen3_training"), "Five")  # the template has an empty thinking block before it
    rollout = run(Agent(environment_factory=Higher), sampler).rollouts[0]
    assert [turn.ids.tolist() for turn in rollout.own] == sampler.drawn
    assert rollout.counts["history/normalised"] == 2
    assert "think" not in sampler.tokenizer.decode(sampler.read[-1])


def test_calls_are_read_by_the_response_template_where_there_is_one() -> None:
    utils = pytest.importorskip("trl.chat_template_utils")
    tokenizer = tokenizer_of("qwen3")
    with_parser = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|im_end|>")
    with_parser.chat_template = tokenizer.chat_template
    utils.add_response_schema(with_parser)
    sampler = Says(with_parser, f"<think>\nadd\n</think>\n\nHere: {CALL}", "<think>\nso\n</think>\n\nSeven.")
    rollout = run(Agent(tools=[add]), sampler).rollouts[0]
    first = rollout.own[0].messages[0]
    assert first["reasoning_content"].strip() == "add"
    assert first["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 3, "b": 4}}
    assert rollout.turns[1].text == "7"


@pytest.mark.parametrize("method", ["reset", "step", "get_reward"])
@pytest.mark.parametrize("why", ["raised", "timeout", "invalid"])
def test_an_environment_that_fails_loses_no_trajectory(method: str, why: str, release: threading.Event) -> None:
    tokenizer = tokenizer_of("smollm2")

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if why == "raised":
            raise OSError("gone")
        return release.wait() if why == "timeout" else object()

    class Fails(Higher):
        def get_reward(self) -> float:
            return 1.0

    class Broken(Fails):
        pass

    def broken(self: Any, message: Any = None, example: Any = None) -> Any:
        return wrong()

    setattr(Broken, method, broken)
    made = iter([Fails, Broken, Fails, Fails])
    agent = Agent(environment_factory=lambda: next(made)(), timeout=0.1, on_error="drop")
    group = run(agent, Says(tokenizer, "Five"), count=3)
    outcomes = [rollout.outcome for rollout in group.rollouts]
    assert sorted(outcomes) == ["answered", "answered", "failed"]
    broken_one = group.rollouts[outcomes.index("failed")]
    assert broken_one.reward is None
    assert broken_one.counts[f"environment/{why}"] == 1
    assert broken_one.turns  # it is there, and says how far it came
    assert len(agent._free) == (2 if why == "timeout" else 3)
    made = iter([Broken])
    with pytest.raises(EpisodeError, match=rf"rows:1, trajectory 0, turn \d: the environment's {method} "):
        run(Agent(environment_factory=lambda: next(made)(), timeout=0.1), Says(tokenizer, "Five"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tools or environment_factory must be given"),
        ({"tools": [lambda a: a]}, "tools must be functions with typed arguments and a docstring"),
        ({"tools": [add, add]}, "tools must have names of their own, got add, some of them twice"),
        ({"tools": [add], "max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"tools": [add], "timeout": 0}, "timeout must be positive seconds or None, got 0"),
        ({"environment_factory": Higher()}, "environment_factory must be callable, got <"),
        ({"environment_factory": dict}, "environment_factory must make objects that have `reset`.*got a dict"),
        (
            {"environment_factory": lambda: Higher(1, 2, 3)},
            "environment_factory must make an object without arguments, it raised TypeError: .*Higher",
        ),
        (
            {"environment_factory": type("Idle", (), {"reset": lambda self: None})},
            r"must make objects that have `reset`, and `step\(message\)` or methods that are tools, got a Idle",
        ),
        ({"tools": "tools.py"}, "tools must be a list of functions, got 'tools.py'"),
        ({"tools": [3]}, r"tools must be a list of functions, got \[3\]"),
        ({"tools": [add], "on_error": "skip"}, "on_error must be one of raise, drop, got 'skip'"),
        ({"tools": [add], "history": "kept"}, "history must be one of as_sampled, as_rendered, got 'kept'"),
    ],
)
def test_agents_that_could_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Agent(**options)


def test_an_async_environment_keeps_its_loop() -> None:
    loops = set()

    class Awaits(Higher):
        async def reset(self, example: Example) -> None:  # type: ignore[override]
            loops.add(id(asyncio.get_running_loop()))
            self.guesses = 0

        async def step(self, message: dict[str, Any]) -> Any:  # type: ignore[override]
            await asyncio.sleep(0)
            loops.add(id(asyncio.get_running_loop()))
            return Higher.step(self, message)

    rollout = run(Agent(environment_factory=Awaits), Says(tokenizer_of("smollm2"), "Five")).rollouts[0]
    assert rollout.outcome == "answered"
    assert len(loops) == 1
