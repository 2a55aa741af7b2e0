"""Says what a student can do in a turn and who answers: tools that it calls, an environment that it is in.

    agent = Agent(tools=[add], max_turns=4)                   # functions with docstrings, as transformers reads them
    agent = Agent(environment_factory=WordGame, max_turns=6)  # a class, or what makes an object of one

An environment's object serves one trajectory at a time; any method may be async. It has

- `reset(example)`, or `reset(**columns)` as TRL calls it: a text that it returns is added to the prompt;
- `step(message)`: answers `{"role": "assistant", "content": ...}` with a text, a `Reply`, or None where it is over;
- other public methods, as TRL's `environment_factory` has them: tools of this very object;
- `tool_schemas`, with `call_tool(name, /, **arguments)`: tools that are no methods, as a template reads them;
- `get_reward()`: what the trajectory is worth, a number, added to the rewards of its turns.

A tool answers with a text, what JSON has, or a `Reply`, which may end the trajectory. What goes wrong has one outcome
each, and a count. Of a tool that raises, takes too long, returns something else, is not there or does not take such
arguments, the student is told, as the tool's answer. An environment that
does: with `on_error="raise"` the run stops with the row's name, with "drop" the trajectory ends and carries no loss.

Calls are read by the tokenizer's response template where it has one; else they are JSON, alone as Llama 3 writes them
or between `<tool_call>` and `</tool_call>`. Not covered: images in answers.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final, NamedTuple, get_args

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from ..contexts.conversation import History
from ..errors import ArgumentError, require_positive
from ..types import Example, Message, Turn
from .calls import Call, Invalid, read_number
from .rewards import OnError

# Methods of an environment that are no tools.
NO_TOOLS: Final = frozenset({"reset", "get_reward", "close"})
# What a parser may raise of what a student wrote.
UNREADABLE: Final = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class Reply(NamedTuple):
    """Is what an environment answers a turn with, or a tool a call."""

    content: str | None = None  # None: nothing more, and the conversation is over
    done: bool = False  # True: the content, if any, is the last word
    reward: float | None = None  # of the turn
    feedback: str | None = None  # about the turn, for whoever teaches it
    failed: bool = False  # of a tool: the content says what went wrong; counted as if the tool had raised


@dataclass(frozen=True, kw_only=True, eq=False)
class Agent:
    """Holds the tools, the environment, and how long a trajectory may be. Raises `ArgumentError`."""

    tools: Sequence[Callable[..., Any]] = ()
    environment_factory: Callable[[], Any] | None = None
    max_turns: int = 8  # of the student
    max_tokens: int | None = None  # behind the prompt, of all sides; None: what the model can read
    max_seconds: float | None = None  # for the trajectories of a batch; None: no limit
    timeout: float | None = 60.0  # seconds for each call; None: no limit
    on_error: OnError = "raise"
    history: History = "as_sampled"
    _free: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all(callable(tool) and hasattr(tool, "__name__") for tool in self.tools):
            raise ArgumentError(f"tools must be a list of functions, got {self.tools!r:.80}")
        if not self.tools and self.environment_factory is None:
            raise ArgumentError("tools or environment_factory must be given, got neither: nobody would answer")
        for name, kind in (("on_error", OnError), ("history", History)):
            if getattr(self, name) not in get_args(kind):
                raise ArgumentError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        require_positive(max_turns=self.max_turns, max_tokens=self.max_tokens)
        for name, seconds in (("timeout", self.timeout), ("max_seconds", self.max_seconds)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ArgumentError(f"{name} must be positive seconds or None, got {seconds}")
        if not callable(self.environment_factory or dict):
            raise ArgumentError(f"environment_factory must be callable, got {self.environment_factory!r:.80}")
        self.release(self.host())
        self.schemas  # noqa: B018  # a tool without a docstring is refused now

    @cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """Describes the tools to the chat template."""
        host = self.host()
        described = _described(host.environment)
        try:
            schemas = [described.get(name) or get_json_schema(tool) for name, tool in host.tools.items()]
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ArgumentError(
                "tools must be functions with typed arguments and a docstring that describes each in a Google-style "
                f"`Args:` section: {error}"
            ) from error
        self.release(host)
        return schemas

    @property
    def summary(self) -> dict[str, Any]:
        """Returns what a run's description says of it."""
        made: Any = self.environment_factory
        names = [tool.__name__ for tool in self.tools]
        return {"tools": names, "environment": made and getattr(made, "__qualname__", type(made).__qualname__)}

    def host(self) -> Host:
        """Returns who answers in a new trajectory."""
        environment, methods, own = None, [], {}
        if self.environment_factory is not None:
            environment = self._free.pop() if self._free else self._made(self.environment_factory)
            methods = _methods(environment)
            own = {name: partial(environment.call_tool, name) for name in _described(environment)}
            if not callable(getattr(environment, "reset", None)) or not (
                methods or own or self.tools or _has_step(environment)
            ):
                raise ArgumentError(
                    "environment_factory must make objects that have `reset`, and `step(message)` or methods that are "
                    f"tools, got a {type(environment).__name__}"
                )
        tools = {tool.__name__: tool for tool in [*self.tools, *methods]} | own
        if len(tools) < len(self.tools) + len(methods) + len(own):
            raise ArgumentError(f"tools must have names of their own, got {', '.join(tools)}, some of them twice")
        return Host(environment, tools)

    @staticmethod
    def _made(factory: Callable[[], Any]) -> Any:
        try:
            return factory()
        except Exception as error:
            raise ArgumentError(
                f"environment_factory must make an object without arguments, it raised {type(error).__name__}: {error}"
            ) from error

    def release(self, host: Host) -> None:
        """Takes an environment back that is not in the middle of a call, to be reset and used again."""
        if host.environment is not None:
            self._free.append(host.environment)


class Host(NamedTuple):
    """Is who answers in a trajectory."""

    environment: Any  # None: there are tools alone
    tools: Mapping[str, Callable[..., Any]]

    @property
    def steps(self) -> bool:
        """True where an environment answers what is no call of a tool."""
        return _has_step(self.environment)

    def reset(self, example: Example) -> Call:
        """Returns the call that begins a trajectory."""
        row = {**example.columns, "prompt": example.prompt, "privileged_context": example.privileged_context}
        return Call(self.environment.reset, _taken(self.environment.reset, {"example": example}, row), "reset")

    def call(self, name: object, arguments: object) -> Call | str:
        """Returns the call of a tool, or what is wrong with it."""
        tool = self.tools.get(name) if isinstance(name, str) else None
        if tool is None:
            return f"there is no tool {name!r:.60}, there are {', '.join(self.tools)}"
        if isinstance(arguments, str):
            with suppress(*UNREADABLE):
                arguments = json.loads(arguments)
        if not isinstance(arguments, Mapping):
            return f"{name} takes its arguments as an object, got {arguments!r:.60}"
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            return f"{name}: {error}"
        return Call(tool, arguments, f"tool-{name}")


def read_opening(returned: Any) -> str:
    """Reads what `reset` returned. Raises `Invalid`."""
    if returned is None or isinstance(returned, str):
        return returned or ""
    raise Invalid(f"must return a text or None, got {returned!r:.80}")


def read_reply(returned: Any) -> Reply:
    """Reads what `step` returned. Raises `Invalid`."""
    reply = returned if isinstance(returned, Reply) else Reply(returned)
    for name, text in (("content", reply.content), ("feedback", reply.feedback)):
        if not (text is None or isinstance(text, str)):
            raise Invalid(f"must return a text, a Reply or None, got {text!r:.80} as its {name}")
    if reply.reward is not None:
        reply = reply._replace(reward=read_number(reply.reward))
    return reply._replace(done=bool(reply.done) or reply.content is None)


def read_result(returned: Any) -> Reply:
    """Reads what a tool returned: a text, what JSON has, or a `Reply`. Raises `Invalid`."""
    if isinstance(returned, str | Reply):
        return read_reply(returned)
    try:
        return Reply(json.dumps(returned, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise Invalid(f"must return a text or what JSON has, got {returned!r:.80}") from error


def message_of(own: Turn, before: str, tokenizer: Any, schemas: Sequence[Mapping[str, Any]]) -> Message:
    """Returns what the student said as a message, with the calls of tools that are in it.

    `before` is the text that it read. What cannot be read is content.
    """
    plain: dict[str, Any] = {"role": "assistant", "content": own.text}
    if getattr(tokenizer, "response_template", None) is not None:
        with suppress(*UNREADABLE):
            parsed = tokenizer.parse_response(own.ids.tolist(), prefix=before, tools=list(schemas) or None)
            return {**parsed, "role": "assistant", "content": parsed.get("content") or ""}
    tagged = _TAGGED.findall(own.text)
    calls = [call for call in map(_json_call, tagged or [own.text.strip()]) if call is not None] if schemas else []
    return plain | (
        {"content": _TAGGED.sub("", own.text).strip() if tagged else "", "tool_calls": calls} if calls else {}
    )


def _json_call(text: str) -> dict[str, Any] | None:
    """Returns the call of a tool that a text is; None where it is none."""
    with suppress(*UNREADABLE):
        given = json.loads(text)
        if isinstance(given, dict) and isinstance(given.get("name"), str):
            arguments = given.get("arguments", given.get("parameters", {}))
            return {"type": "function", "function": {"name": given["name"], "arguments": arguments}}
    return None


def _methods(environment: Any) -> list[Callable[..., Any]]:
    """Returns the tools of an environment: its public methods. Looked for on the class, so that no property is read."""
    named = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    names = [name for name, _ in named if not name.startswith("_") and name not in NO_TOOLS]
    unlisted = {"step"} if _has_step(environment) else set()
    unlisted |= {"call_tool"} if hasattr(environment, "tool_schemas") else set()
    return [getattr(environment, name) for name in names if name not in unlisted]


def _described(environment: Any) -> dict[str, dict[str, Any]]:
    """Returns the schemas of the tools that an environment has beside its methods, by name."""
    return {schema["function"]["name"]: schema for schema in getattr(environment, "tool_schemas", ())}


def _has_step(environment: Any) -> bool:
    """True for a `step` that takes a message; any other one is a tool, as TRL has it."""
    step = getattr(environment, "step", None)
    return callable(step) and "message" in inspect.signature(step).parameters


def _taken(function: Callable[..., Any], first: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a function takes: of `first` by its name; else of a row, all where it takes any."""
    parameters = inspect.signature(function).parameters
    if first.keys() & parameters.keys():
        return dict(first)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(row)
    return {name: value for name, value in row.items() if name in parameters}
