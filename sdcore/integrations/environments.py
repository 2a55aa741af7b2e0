"""Lets the student play environments of OpenEnv 0.10 and of verifiers 0.4; each makes objects of `environment_factory`.

    OpenEnvEnvironment(WordleEnv(base_url=url), action=WordleAction, observed=lambda seen: seen.prompt)
    OpenEnvEnvironment(MCPToolClient(base_url=url))                           # the student calls its tools
    VerifiersEnvironment(env, tasks)                                          # a row's column `task` says which

What differs from the obvious: an agent of verifiers is a program in a box that asks an endpoint for a model's words.
Here the student sits in the agent's place, in this process, and tools are called where they are written.

Refused: environments of several agents; tasks that need a box, or that stop or change turns; tools with a state in
common with their task. The classic `MultiTurnEnv` left verifiers with 0.4.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ..errors import ArgumentError
from ..rollouts.calls import Call, call_all
from ..rollouts.environments import Reply, read_result
from ..types import Example, Message


class OpenEnvEnvironment:
    """Plays through a client of OpenEnv, a session of its own for each object. A row's column `reset` goes to `reset`.

    Args:
        client: an `EnvClient` or `MCPToolClient`; it connects when it is first used.
        action: makes of what the student says what the client's `step` takes; None: it can only call tools.
        observed: makes of an observation what the student reads of it; the first one's is added to the prompt.
    """

    def __init__(
        self, client: Any, *, action: Callable[[str], Any] | None = None, observed: Callable[[Any], str] | None = None
    ) -> None:
        try:
            from openenv.core import EnvClient
            from openenv.core.env_server.mcp_types import ListToolsAction
            from openenv.core.mcp_client import MCPClientBase
        except ImportError as error:
            raise ImportError('OpenEnvEnvironment needs OpenEnv: pip install "sdcore[openenv]"') from error
        if not isinstance(client, EnvClient):
            raise ArgumentError(f"client must be an EnvClient of OpenEnv, got {client!r:.80}")

        async def list_tools() -> Any:
            # By a step, as they are called: `client.list_tools` has none where it fails, `call_tool` no reward.
            return (await client.step(ListToolsAction())).observation.tools

        self.tool_schemas = _schemas(list_tools) if isinstance(client, MCPClientBase) else []
        if (action is None) != (observed is None) or not (action or self.tool_schemas):
            raise ArgumentError("action and observed must be given together, and where the client lists no tools")
        self._client, self._action, self._observed = client, action, observed

    async def reset(self, example: Example) -> str | None:
        result = await self._client.reset(**(example.columns.get("reset") or {}))
        return self._observed and self._observed(result.observation)

    async def step(self, message: Message) -> Reply | None:
        if self._action is None or self._observed is None:
            return None
        result = await self._client.step(self._action(message["content"]))
        return Reply(self._observed(result.observation), done=result.done, reward=result.reward)

    async def call_tool(self, name: str, /, **arguments: Any) -> Reply:
        from openenv.core.env_server.mcp_types import CallToolAction

        result = await self._client.step(CallToolAction(tool_name=name, arguments=arguments))
        error, returned = result.observation.error, result.observation.result
        if isinstance(returned, dict) and "data" in returned:
            returned = returned["data"]
        text = read_result(returned).content if error is None else f"Error: {error.message}"
        return Reply(text, done=result.done, reward=result.reward, failed=error is not None)


class VerifiersEnvironment:
    """Plays an environment of verifiers that has one agent: `Env.run` is told what the student says."""

    def __init__(self, env: Any, tasks: Sequence[Any]) -> None:
        try:
            import verifiers.v1 as vf
            from verifiers.v1.utils.decorators import discover_decorated
        except ImportError as error:
            raise ImportError('VerifiersEnvironment needs verifiers 0.4: pip install "sdcore[verifiers]"') from error
        if not tasks:
            raise ArgumentError("tasks must have at least one, got none")
        seats = [name for name, value in env.config if isinstance(value, vf.AgentConfig)]
        if len(seats) != 1:
            raise ArgumentError(f"env must have one agent, got {', '.join(seats)}")
        for task in tasks:
            refused = [hook for hook in task.hooks("reward") if "runtime" in inspect.signature(hook).parameters]
            refused += [*task.hooks("stop"), *discover_decorated(task, "intercept")]
            if refused or task.NEEDS_CONTAINER:
                names = ", ".join(hook.__name__ for hook in refused) or "NEEDS_CONTAINER"
                raise ArgumentError(f"tasks must need no box and not stop or change turns, got one with {names}")
        self._vf, self._env, self._tasks = vf, env, tasks
        self._run: Any = None
        self.tool_schemas = _schemas(self._served(tasks[0])[0].list_tools)

    def _served(self, task: Any) -> tuple[Any, list[Any], list[Any]]:
        """Returns the tools of a task and of its task set, and the servers of both."""
        from mcp.server.mcpserver import MCPServer

        tools, own = MCPServer("tools"), task.toolsets(task.config)
        shared = self._env.taskset.toolsets(self._env.taskset.config)
        for server in [*own, *shared]:
            if type(server.state) is not self._vf.State:
                raise ArgumentError(f"tools must have no state in common with their task, got {type(server).__name__}")
            server.register(tools)
        return tools, own, shared

    async def reset(self, example: Example) -> str | None:
        if self._run is not None:
            self._run.cancel()
        number = example.columns.get("task")
        if not isinstance(number, int) or not 0 <= number < len(self._tasks):
            raise ArgumentError(f"column `task` must be in [0, {len(self._tasks)}), got {number!r:.60}")
        self._task = self._tasks[number]
        self._tools, own, shared = self._served(self._task)
        for server in [*own, *shared]:
            await server.setup()
        for server in own:
            await server.setup_task(self._task.data)
        self._seat = seat = _Seat(self._vf, example)
        agents = self._vf.Agents(self._env.config, lambda name, config: seat)
        self._run = asyncio.ensure_future(self._env.run(self._task, agents))
        self._run.add_done_callback(lambda _: seat.told.put_nowait(None))
        return await self._told()

    async def step(self, message: Message) -> str | None:
        self._seat.said.put_nowait(message["content"])
        return await self._told()

    async def _told(self) -> str | None:
        told = await self._seat.told.get()
        return await self._run if self._run.done() else told  # None, or what it raised

    async def call_tool(self, name: str, /, **arguments: Any) -> str:
        call = self._vf.ToolCall(id=uuid.uuid4().hex, name=name, arguments=json.dumps(arguments))
        self._seat.add("assistant", sampled=True, tool_calls=[call])
        text = "Error"  # what the trace has where it raises
        try:
            result = await self._tools.call_tool(name, arguments)
            text = "\n".join(str(getattr(block, "text", block)) for block in result.content)
        finally:
            self._seat.add("tool", tool_call_id=call.id, name=name, content=text)
        return text

    async def get_reward(self) -> float:
        self._seat.said.put_nowait(None)
        await self._run
        trace = self._seat.trace
        info = self._vf.EnvInfo(id=self._env.config.env_id)
        await self._env.finalize(self._task, self._vf.Episode(env=info, task=trace.task, traces=[trace]))
        return trace.reward


class _Seat:
    """Is the agent that `Env.run` gets, and its interaction."""

    def __init__(self, vf: Any, example: Example) -> None:
        self.vf, self.prompt = vf, example.prompt
        self.trace: Any = None
        self.told, self.said = asyncio.Queue[str | None](), asyncio.Queue[str | None]()

    def add(self, role: str, *, sampled: bool = False, **fields: Any) -> Any:
        nodes = self.trace.nodes
        message = getattr(self.vf, f"{role.title()}Message")(**fields)
        nodes.append(self.vf.MessageNode(parent=len(nodes) - 1 if nodes else None, message=message, sampled=sampled))
        return message

    @asynccontextmanager
    async def interaction(self, task: Any, **options: Any) -> AsyncIterator[_Seat]:
        from verifiers.v1.utils.decorators import invoke

        if self.trace is not None:
            raise ArgumentError("env must let its agent play a task once")
        seed = self.vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        self.trace = self.vf.Trace(task=seed, agent=self.vf.AgentInfo(config=self.vf.AgentConfig()))
        for message in self.prompt:
            if isinstance(message, Mapping) and message["content"]:
                self.add(message["role"], content=message["content"])
        await invoke(task.setup, {"trace": self.trace, "runtime": None})
        yield self
        self.trace.stop("user_closed")
        await invoke(task.finalize, {"trace": self.trace, "runtime": None})
        await task.score(self.trace)

    async def run(self, task: Any, **options: Any) -> Any:
        async with self.interaction(task):
            await self.turn()
        return self.trace

    async def turn(self, message: str | None = None) -> Any:
        if message is not None:
            self.add("user", content=message)
        await self.told.put(message)
        content = await self.said.get()
        said = [] if content is None else [self.add("assistant", sampled=True, content=content)]
        return self.vf.Segment(messages=said, terminated=content is None)


def _schemas(list_tools: Callable[[], Any]) -> list[dict[str, Any]]:
    """Returns the tools that an MCP server lists, as chat templates read them."""
    (answer,) = call_all([Call(list_tools, {}, "list_tools")], 60.0)
    if answer.problem is not None:
        raise ArgumentError(f"the environment must list its tools, but it {answer.problem}") from answer.error
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
        }
        for tool in answer.value
    ]


__all__ = ["OpenEnvEnvironment", "VerifiersEnvironment"]
