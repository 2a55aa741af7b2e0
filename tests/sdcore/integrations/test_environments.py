"""Environments of verifiers and OpenEnv, the really installed packages, played by a sampler that says what it is told.

Neither package is an extra of the tests' environment: openenv 0.10 asks for an older pillow than the pinned one, and
verifiers 0.4 for another mcp than openenv. Where one is missing its tests are skipped.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdcore.errors import ArgumentError
from sdcore.integrations.environments import OpenEnvEnvironment, VerifiersEnvironment
from sdcore.rollouts.environments import Agent
from sdcore.rollouts.episodes import EpisodeError
from sdcore.types import Example
from tests.sdcore.rollouts.talks import Says, learned, run, tokenizer_of

TASKS = """
import verifiers.v1 as vf

__all__ = ["Numbers", "Guessing"]


class NumberData(vf.TaskData):
    number: int


class NumberTask(vf.Task[NumberData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def named(self, trace: vf.Trace) -> float:
        return float(str(self.data.number) in trace.last_reply)

    @vf.reward(weight=0.5)
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


class Numbers(vf.Taskset[NumberTask, vf.TasksetConfig]):
    def load(self):
        for number in (5, 7):
            yield NumberTask(NumberData(number=number, prompt="Guess!", system_prompt="Briefly."), self.config.task)


class GuessingConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class Guessing(vf.Env[GuessingConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated and str(task.data.number) not in segment.last_reply:
                segment = await talk.turn("Too low.")
        talk.trace.record_reward("played", 10.0)

    async def finalize(self, task, episode):
        (trace,) = episode.traces
        trace.record_reward("final", 100.0 * trace.num_turns)
"""
TOOLS = """
import verifiers.v1 as vf

__all__ = ["Sums"]


class Adder(vf.Toolset[vf.ToolsetConfig, vf.State]):
    async def setup_task(self, task):
        self.more = task.idx

    @vf.tool
    async def add(self, a: int, b: int) -> int:
        "Adds, and the number of the task."
        return a + b + self.more


class SumTask(vf.Task):
    @vf.reward
    async def told(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == trace.tool_messages[-1].content)

    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for _ in range(2):
            yield SumTask(vf.TaskData(prompt="3 + 4?"), self.config.task)
"""


@pytest.fixture
def verifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes environment and tasks of a text that is a task set of verifiers."""
    pytest.importorskip("verifiers.v1", reason="needs verifiers 0.4")
    import verifiers.v1 as vf

    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text: str, name: str, **config: Any) -> tuple[Any, list[Any]]:
        (tmp_path / f"{name}.py").write_text(text)
        env = vf.load_environment(vf.resolve_env_config({"taskset": {"id": name}} | config))
        return env, [*env.taskset]

    return make


def row(task: Any, number: int) -> Example:
    said = [{"role": "system", "content": task.data.system_prompt}] if task.data.system_prompt else []
    return Example(
        prompt=(*said, {"role": "user", "content": task.data.prompt or ""}), columns={"task": number}, source="rows:1"
    )


def test_an_environment_of_verifiers_is_played_turn_by_turn(verifiers: Any) -> None:
    env, tasks = verifiers(TASKS, "numbers_guessed")
    agent = Agent(environment_factory=lambda: VerifiersEnvironment(env, tasks))
    sampler = Says(tokenizer_of("smollm2"), "Five", "Six", "It is 7.")
    group = run(agent, sampler, row(tasks[1], 1), count=2)
    for rollout in group.rollouts:
        assert rollout.outcome == "answered"
        assert [turn.text for turn in rollout.turns] == ["Five", "Too low.", "Six", "Too low.", "It is 7."]
        assert rollout.reward == 1.0 + 1.5 + 10.0 + 300.0
    assert len(learned(group)) == 3
    again = run(agent, Says(tokenizer_of("smollm2"), "5"), row(tasks[0], 0)).rollouts[0]
    assert (len(again.turns), again.reward) == (1, 1.0 + 0.5 + 10.0 + 100.0)


def test_a_trajectory_that_is_cut_off_is_judged_as_far_as_it_went(verifiers: Any) -> None:
    env, tasks = verifiers(TASKS, "numbers_cut")
    agent = Agent(environment_factory=lambda: VerifiersEnvironment(env, tasks), max_turns=2)
    rollout = run(agent, Says(tokenizer_of("smollm2"), "Five"), row(tasks[0], 0)).rollouts[0]
    assert (rollout.outcome, rollout.reward) == ("turns", 0.0 + 1.0 + 10.0 + 200.0)


def test_tools_of_verifiers_are_called_in_this_process(verifiers: Any) -> None:
    env, tasks = verifiers(TOOLS, "sums_with_tools")
    agent = Agent(environment_factory=lambda: VerifiersEnvironment(env, tasks))
    (schema,) = agent.schemas
    assert schema["function"]["name"] == "add"
    assert schema["function"]["parameters"]["required"] == ["a", "b"]
    call = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'
    rollout = run(agent, Says(tokenizer_of("smollm2"), call, "8"), row(tasks[1], 1)).rollouts[0]
    assert [turn.text for turn in rollout.turns] == [call, "8", "8"]
    assert (rollout.outcome, rollout.reward) == ("answered", 1.0)
    wrong = call.replace("3", '"x"')
    rollout = run(agent, Says(tokenizer_of("smollm2"), wrong, "8"), row(tasks[0], 0)).rollouts[0]
    assert rollout.turns[1].text.startswith("Error: the tool raised ToolError: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("def named(self, trace: vf.Trace)", "def named(self, trace: vf.Trace, runtime)"), "got one with named"),
        (("@vf.reward(weight=0.5)", "@vf.stop"), "got one with turns"),
        (
            (
                "def turns(self, trace)",
                "def turns(self, trace):\n        ...\n    NEEDS_CONTAINER = True\n    async def f(self)",
            ),
            "NEEDS_",
        ),
        (("    player: vf", "    other: vf.AgentConfig = vf.AgentConfig()\n    player: vf"), "got other, player"),
    ],
)
def test_what_would_be_left_out_of_verifiers_is_refused(verifiers: Any, change: tuple[str, str], words: str) -> None:
    env, tasks = verifiers(TASKS.replace(*change), f"numbers_{abs(hash(change))}")
    with pytest.raises(ArgumentError, match=words):
        VerifiersEnvironment(env, tasks)


@pytest.mark.parametrize("number", [-1, 2, "0", None])
def test_a_row_without_a_task_of_verifiers_is_refused_by_name(verifiers: Any, number: Any) -> None:
    env, tasks = verifiers(TASKS, f"numbers_without_{type(number).__name__.lower()}{len(str(number))}")
    with pytest.raises(ArgumentError, match="tasks must have at least one, got none"):
        VerifiersEnvironment(env, [])
    agent = Agent(environment_factory=lambda: VerifiersEnvironment(env, tasks))
    with pytest.raises(EpisodeError, match=rf"rows:1, .*column `task` must be in \[0, 2\), got {number!r}"):
        run(agent, Says(tokenizer_of("smollm2"), "Five"), row(tasks[0], number))


def test_what_an_environment_of_verifiers_raises_has_the_row_s_name(verifiers: Any) -> None:
    env, tasks = verifiers(TASKS.replace('"Too low."', "task.data.answer"), "numbers_broken")
    agent = Agent(environment_factory=lambda: VerifiersEnvironment(env, tasks))
    with pytest.raises(EpisodeError, match=r"rows:1, .*the environment's step raised AttributeError"):
        run(agent, Says(tokenizer_of("smollm2"), "Five"), row(tasks[1], 1))


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of two environments of OpenEnv on this machine: one that is stepped, one that has tools."""
    pytest.importorskip("openenv.core", reason="needs openenv 0.10")
    import uvicorn
    from fastapi import FastAPI
    from fastmcp import FastMCP
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation

    class Guess(Action):
        number: int

    class Heard(Observation):
        text: str = ""

    class Guessing(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Heard:
            self.number = seed or 0
            return Heard(text=f" Below {self.number + 2}.")

        def step(self, action: Any, timeout_s: float | None = None, **kwargs: Any) -> Heard:
            return Heard(text="yes" if (hit := action.number == self.number) else "no", reward=float(hit), done=hit)

        @property
        def state(self) -> State:
            return State()

    class Adding(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            server = FastMCP("adding")

            @server.tool
            def add(a: int, b: int) -> int:
                "Adds."
                return a + b

            super().__init__(server)

        def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
            return Observation()

        async def step_async(self, action: Any, **options: Any) -> Any:
            seen = await super().step_async(action, **options)
            if not isinstance(action, CallToolAction):
                return seen
            return seen.model_copy(update={"reward": 0.5, "done": action.arguments["a"] == 9})

        def _step_impl(self, action: Any, **options: Any) -> Any:
            raise NotImplementedError

        @property
        def state(self) -> State:
            return State()

    app = FastAPI()
    app.mount("/guess", create_fastapi_app(Guessing, Guess, Heard, max_concurrent_envs=4))
    app.mount("/add", create_fastapi_app(Adding, CallToolAction, CallToolObservation, max_concurrent_envs=4))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def guessing(address: str) -> OpenEnvEnvironment:
    from openenv.core import GenericEnvClient

    client = GenericEnvClient(base_url=f"{address}/guess")
    return OpenEnvEnvironment(client, action=lambda said: {"number": int(said)}, observed=lambda seen: seen["text"])


def test_an_environment_of_openenv_is_stepped_through_its_client(served: str) -> None:
    agent = Agent(environment_factory=lambda: guessing(served))
    example = Example(prompt=({"role": "user", "content": "Guess!"},), columns={"reset": {"seed": 7}}, source="rows:1")
    sampler = Says(tokenizer_of("smollm2"), "5", lambda i: "7" if i % 2 else "6", "7")
    group = run(agent, sampler, example, count=2)
    assert group.example.prompt == ({"role": "user", "content": "Guess! Below 9."},)
    assert [[turn.text for turn in rollout.turns] for rollout in group.rollouts] == [
        ["5", "no", "6", "no", "7", "yes"],
        ["5", "no", "7", "yes"],
    ]
    assert [[turn.reward for turn in rollout.own] for rollout in group.rollouts] == [[0.0, 0.0, 1.0], [0.0, 1.0]]
    assert [rollout.outcome for rollout in group.rollouts] == ["answered"] * 2


def test_tools_of_openenv_are_called_through_its_client(served: str) -> None:
    from openenv.core import MCPToolClient

    agent = Agent(environment_factory=lambda: OpenEnvEnvironment(MCPToolClient(base_url=f"{served}/add")))
    (schema,) = agent.schemas
    assert (schema["function"]["name"], sorted(schema["function"]["parameters"]["properties"])) == ("add", ["a", "b"])
    call = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'
    sampler = Says(tokenizer_of("smollm2"), call, call.replace("3", '"x"'), "7")
    rollout = run(agent, sampler, Example(prompt=({"role": "user", "content": "3 + 4?"},), source="rows:1")).rollouts[0]
    assert [turn.text for turn in rollout.turns][:2] == [call, "7"]
    assert rollout.turns[3].text.startswith("Error: ")
    assert (rollout.outcome, rollout.reward, rollout.counts["tools/raised"]) == ("answered", 1.0, 1)
    assert [turn.reward for turn in rollout.own] == [0.5, 0.5, None]


def test_a_tool_of_openenv_that_ends_the_episode_ends_the_trajectory(served: str) -> None:
    from openenv.core import MCPToolClient

    agent = Agent(environment_factory=lambda: OpenEnvEnvironment(MCPToolClient(base_url=f"{served}/add")))
    call = '<tool_call>{"name": "add", "arguments": {"a": 3, "b": 4}}</tool_call>'
    sampler = Says(tokenizer_of("smollm2"), call, call.replace("3", "9"), "never said")
    for _ in range(2):  # the second time with the same object, reset
        rollout = run(agent, sampler, Example(prompt=({"role": "user", "content": "3 + 4?"},))).rollouts[0]
        assert [turn.text for turn in rollout.turns] == [call, "7", call.replace("3", "9"), "13"]
        assert (rollout.outcome, rollout.reward) == ("answered", 1.0)
        sampler.seeds.clear()


def test_clients_of_openenv_that_do_not_fit_are_refused(served: str) -> None:
    from openenv.core import GenericEnvClient, MCPToolClient

    with pytest.raises(ArgumentError, match="client must be an EnvClient of OpenEnv"):
        OpenEnvEnvironment(object())
    with pytest.raises(ArgumentError, match="action and observed must be given together"):
        OpenEnvEnvironment(GenericEnvClient(base_url=served), action=str)
    with pytest.raises(ArgumentError, match="must list its tools, but it raised"):
        OpenEnvEnvironment(MCPToolClient(base_url=f"{served}/nothing"))
