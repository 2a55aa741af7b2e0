"""Calls functions that others wrote: rewards, tools, environments, sync or async, each within its time.

    answers = call_all([Call(function, {"a": 1}, "add")], timeout=10)     # in their order; nothing is raised
    answers[0].value, answers[0].problem, answers[0].why

What differs from the obvious: **a thread cannot be killed.** A function that hangs is left behind in a daemon thread
and goes on using what it uses until the process ends. Sync functions are called one after the other unless `workers`
says that they may run at the same time; async ones always may, and all in one event loop that stays, so that clients
which belong to a loop can be used again.

Not covered: code that may hang and can be in a process of its own (`rollouts.sandbox.run_limited`).
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from ..errors import SdcoreError

MOST_LEFT_BEHIND: Final = 16  # hung threads after which going on only makes it worse
MOST_AT_ONCE: Final = 64  # async calls in flight
GRACE_SECONDS: Final = 1.0  # for an event loop to notice that a call is too late


class Invalid(SdcoreError, ValueError):
    """Says that a function returned something else than it may."""


class Call(NamedTuple):
    """Is a function with what it is called with."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    name: str  # of its thread


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Is what came of a call: what was read of the returned value, or a problem."""

    value: Any = None
    problem: str | None = None
    why: Literal["raised", "timeout", "invalid"] = "invalid"
    error: BaseException | None = None


def call_all(
    calls: Sequence[Call],
    timeout: float | None,
    *,
    read: Callable[[Any], Any] = lambda value: value,
    workers: int = 1,
    stop_early: bool = False,
) -> list[Answer]:
    """Returns answers in the order of the calls; `read` makes values of what is returned, or raises `Invalid`.

    With `stop_early` nothing is called after a sync one has failed.
    """
    answers: list[Answer | None] = [None] * len(calls)
    waiting = [i for i, call in enumerate(calls) if is_async(call.function)]
    for i, answer in zip(waiting, _await_all([calls[i] for i in waiting], timeout, read), strict=True):
        answers[i] = answer
    todo = [i for i, call in enumerate(calls) if not is_async(call.function)]
    if workers == 1 or len(todo) <= 1:
        for i in todo:
            answers[i] = _call(calls[i], timeout, read)
            if stop_early and answers[i].problem is not None:  # type: ignore[union-attr]  # set the line before
                break
    else:
        # Daemons, unlike an executor's threads: a function that hangs must not keep the process from ending.
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in todo:
            left.put(i)

        def lane() -> None:
            with suppress(queue.Empty):
                while True:
                    i = left.get_nowait()
                    answers[i] = _call(calls[i], timeout, read)

        lanes = [threading.Thread(target=lane, daemon=True) for _ in range(min(workers, len(todo)))]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
    return [answer or Answer(problem="was not called") for answer in answers]


def read_number(returned: Any, what: str = "a number") -> float:
    """Reads a number, Python's or that of an array without dimensions. Raises `Invalid`."""
    is_array = not isinstance(returned, numbers.Real) and getattr(returned, "ndim", None) == 0
    value = returned.item() if is_array and hasattr(returned, "item") else returned
    if not isinstance(value, numbers.Real):
        raise Invalid(f"must return {what}, got {returned!r:.80}")
    if not math.isfinite(value):
        raise Invalid(f"must return a finite number, got {float(value)}")
    return float(value)


def is_async(function: Callable[..., Any]) -> bool:
    """True for a coroutine function, and for an object whose call is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # the method of an object, not whether there is one
    )


def too_many_left(timeout: float | None) -> str | None:
    """Says that calls were left behind, where they are so many that a run had better stop."""
    if (count := _left_behind()) < MOST_LEFT_BEHIND:
        return None
    return (
        f"{count} calls of reward functions, tools or environments still run after their {timeout or 0:g} seconds; "
        "they cannot be killed, so the run stops. Give the function a limit of its own, such as "
        "rollouts.sandbox.run_limited"
    )


# Threads that were given up, as long as they run.
_ABANDONED: list[threading.Thread] = []
_LOOP: list[tuple[asyncio.AbstractEventLoop, threading.Thread]] = []  # the one that async calls are made in


def _left_behind() -> int:
    _ABANDONED[:] = [thread for thread in _ABANDONED if thread.is_alive()]
    return len(_ABANDONED)


def _raised(error: BaseException) -> Answer:
    if isinstance(error, Invalid):
        return Answer(problem=str(error), error=error)
    return Answer(problem=f"raised {type(error).__name__}: {error}", why="raised", error=error)


def _late(timeout: float) -> Answer:
    return Answer(problem=f"did not return within {timeout:g} seconds", why="timeout")


def _call(call: Call, timeout: float | None, read: Callable[[Any], Any]) -> Answer:
    """Makes one sync call, in a thread of its own if it has a time limit."""
    answers: list[Answer] = []

    def run() -> None:
        try:
            answers.append(Answer(value=read(call.function(**call.arguments))))
        except Exception as error:
            answers.append(_raised(error))

    if timeout is None:
        run()
        return answers[0]
    # Not a pool: its threads are joined when the process ends, and a hung one would keep it from ending.
    thread = threading.Thread(target=run, daemon=True, name=call.name)
    thread.start()
    thread.join(timeout)
    if thread.is_alive() and not answers:
        _ABANDONED.append(thread)
        return _late(timeout)
    return answers[0] if answers else Answer(problem="ended its thread", why="raised")


def _await_all(calls: Sequence[Call], timeout: float | None, read: Callable[[Any], Any]) -> list[Answer]:
    """Makes async calls, some at a time, in an event loop of their own thread: the caller may have one already."""
    if not calls:
        return []
    answers: list[Answer | None] = [None] * len(calls)

    async def one(i: int, call: Call, turn: asyncio.Semaphore) -> None:
        async with turn:
            try:
                answers[i] = Answer(value=read(await asyncio.wait_for(call.function(**call.arguments), timeout)))
            except TimeoutError as error:
                # Its own TimeoutError is an exception like another.
                answers[i] = _late(timeout) if timeout is not None else _raised(error)
            except Exception as error:
                answers[i] = _raised(error)

    async def everything() -> None:
        turn = asyncio.Semaphore(MOST_AT_ONCE)
        await asyncio.gather(*(one(i, call, turn) for i, call in enumerate(calls)))

    if not _LOOP:
        loop = asyncio.new_event_loop()
        _LOOP.append((loop, threading.Thread(target=loop.run_forever, daemon=True, name="sdcore-async")))
        _LOOP[0][1].start()
    loop, thread = _LOOP[0]
    done = asyncio.run_coroutine_threadsafe(everything(), loop)
    # A call that blocks its loop keeps all others from being noticed late, too.
    rounds = -(-len(calls) // MOST_AT_ONCE)
    try:
        done.result(None if timeout is None else rounds * timeout + GRACE_SECONDS)
    except TimeoutError:
        _LOOP.clear()
        loop.call_soon_threadsafe(loop.stop)
        _ABANDONED.append(thread)
    blocked = _late(timeout) if timeout is not None else Answer(problem="was never finished", why="raised")
    return [answer or blocked for answer in answers]
