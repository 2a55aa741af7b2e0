"""Runs a command or a piece of Python with limits on time, memory, files and output: what verifiers run in.

    result = run_limited(python="print(sum(range(10)))", wall_seconds=2)
    result.stdout, result.ok                                # "45\\n", True

The command gets an environment of four harmless variables, a temporary directory that is deleted afterwards, no open
files but its three, and limits that the kernel keeps. Everything it started dies with it, also what left its session.

**This is no security boundary.** It stops accidents: an endless loop, a program that eats the memory, a reward that
leaks into the next one. The code runs as you. It reads what you can read (your files and, through /proc, the
environment of your own processes), writes where you can write, and has the network. Memory is limited for each
process, not for all of them, and files by size, not by number; the number of processes is not limited for root. For
code that you have reason to fear, run the whole trainer in a container or a virtual machine. That goes for what a
student writes too, where `run_python` is a tool of it.

Linux only: elsewhere `run_limited` raises `SandboxError` instead of running without limits.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

from ..errors import ArgumentError, SdcoreError

CHILD: Final = Path(__file__).with_name("sandbox_child.py")
SEARCH_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
# After its time the child kills and reports; if it does not, as when the command killed it, we do.
GRACE_SECONDS: Final = 8.0


class SandboxError(SdcoreError, RuntimeError):
    """Says that a command could not be run under limits at all; what it did itself is in a `SandboxResult`."""


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """Holds what a limited command did."""

    exit_code: int | None  # None: it was ended by a signal, its own or ours
    signal: int | None  # the number, where it was
    timed_out: bool
    stdout: str
    stderr: str
    truncated: bool  # one of the two was longer than `max_output`: its middle was left out
    seconds: float

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def outcome(self) -> str:
        """Says in words: "exit code 1", "timed out after 2.0 s", "used up its CPU time"."""
        if self.timed_out:
            return f"timed out after {self.seconds:.1f} s"
        if self.signal is None:
            return f"exit code {self.exit_code}"
        known = {signal.SIGXCPU: "used up its CPU time", signal.SIGXFSZ: "wrote a file that is larger than allowed"}
        return known.get(signal.Signals(self.signal), f"ended by {signal.Signals(self.signal).name}")


def run_limited(
    command: str | Sequence[str] | None = None,
    *,
    python: str | None = None,
    stdin: str = "",
    wall_seconds: float = 10.0,
    cpu_seconds: float = 10.0,
    memory_mb: float = 1024.0,
    file_mb: float = 16.0,
    max_output: int = 65_536,
    processes: int = 64,
    open_files: int = 64,
) -> SandboxResult:
    """Runs a command under limits and waits for it.

    Args:
        command: a list is run as it is, a string by `/bin/sh -c`. Or `python`, the text of a program for this
            interpreter, which finds installed packages but neither your directory nor your environment.
        stdin: what it can read.
        wall_seconds, cpu_seconds: of the clock, and of each process on a core (rounded up to whole seconds).
        memory_mb: address space of each process, in MiB. numpy and its threads want a few hundred.
        file_mb: size of a file that it may write, in MiB.
        max_output: bytes kept of stdout and of stderr; of more, the first and the last half.
        processes: processes and threads that it may have at a time; not enforced for root.
        open_files: file descriptors of each process.

    Raises `ArgumentError` for limits without meaning, and `SandboxError` where there are no limits (not Linux) or the
    command cannot be started.
    """
    if sys.platform != "linux":
        raise SandboxError(f"limits on a command need Linux, this is {sys.platform}: run the trainer in a container")
    if (command is None) == (python is None):
        raise ArgumentError("one of command and python must be given")
    limits = {
        "wall_seconds": wall_seconds,
        "cpu_seconds": cpu_seconds,
        "memory_mb": memory_mb,
        "file_mb": file_mb,
        "processes": processes,
        "open_files": open_files,
    }
    for name, value in (limits | {"max_output": max_output}).items():
        if not 0 < value < float("inf"):
            raise ArgumentError(f"{name} must be positive and finite, got {value}")
    directory = Path(tempfile.mkdtemp(prefix="sdcore-sandbox-"))
    try:
        if python is not None:
            (directory / "program.py").write_text(python, encoding="utf-8")
            command = [sys.executable, "-I", "-X", "utf8", "program.py"]
        elif isinstance(command, str):
            command = ["/bin/sh", "-c", command]
        return _supervised(list(cast(Sequence[str], command)), directory, stdin, limits, max_output)
    finally:
        _remove(directory)


def _supervised(
    command: list[str], directory: Path, stdin: str, limits: dict[str, float], max_output: int
) -> SandboxResult:
    if not command or not all(isinstance(word, str) and "\0" not in word for word in command):
        raise ArgumentError(f"command must be a list of words without NUL, got {command!r}")
    environment = {"PATH": SEARCH_PATH, "HOME": str(directory), "TMPDIR": str(directory), "LANG": "C.UTF-8"}
    status_read, status_write = os.pipe()
    began = time.monotonic()
    with tempfile.TemporaryFile() as given, open(status_read, "rb", buffering=0) as status:
        # A file and no pipe: a command that never reads it blocks nobody.
        given.write(stdin.encode("utf-8", "surrogatepass"))
        given.seek(0)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), str(status_write), json.dumps(limits), *command],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
                env=environment,
                start_new_session=True,
                pass_fds=(status_write,),
            )
        finally:
            os.close(status_write)
        outputs = {"stdout": _Kept(max_output), "stderr": _Kept(max_output), "status": _Kept(65_536)}
        pipes = {"stdout": cast(IO[bytes], child.stdout), "stderr": cast(IO[bytes], child.stderr), "status": status}
        try:
            _read_all(pipes, outputs, began + limits["wall_seconds"] + GRACE_SECONDS)
        finally:
            facts = _facts(outputs["status"].text())
            _end(child, None if "timed_out" in facts else facts.get("pid"))
    if "error" in facts:
        raise SandboxError(f"the command could not be started: {facts['error']}")
    ended = facts.get("exit", facts.get("signal")) is not None
    return SandboxResult(
        exit_code=facts.get("exit"),
        # Whoever killed the process that watched it has not done better by it.
        signal=facts.get("signal", None if ended or facts.get("timed_out") else int(signal.SIGKILL)),
        timed_out=bool(facts.get("timed_out", False)),
        stdout=outputs["stdout"].text(),
        stderr=outputs["stderr"].text(),
        truncated=outputs["stdout"].left_out + outputs["stderr"].left_out > 0,
        seconds=time.monotonic() - began,
    )


class _Kept:
    """Keeps the beginning and the end of a stream, in bounded memory."""

    def __init__(self, most: int) -> None:
        self._head, self._tail = bytearray(), bytearray()
        self._head_size, self._tail_size = most - most // 2, most // 2
        self.left_out = 0

    def add(self, chunk: bytes) -> None:
        room = self._head_size - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:] if room > 0 else chunk
        extra = len(self._tail) - self._tail_size
        if extra > 0:
            del self._tail[:extra]
            self.left_out += extra

    def text(self) -> str:
        head, tail = (part.decode("utf-8", "replace") for part in (self._head, self._tail))
        return f"{head}\n[… {self.left_out} bytes left out …]\n{tail}" if self.left_out else head + tail


def _read_all(pipes: dict[str, IO[bytes]], outputs: dict[str, _Kept], deadline: float) -> None:
    """Reads until every pipe has ended, which is when the last process that could write to it has."""
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 65_536)
                if chunk:
                    outputs[key.data].add(chunk)
                else:
                    selector.unregister(key.fileobj)


def _facts(lines: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in lines.splitlines():
        with suppress(ValueError, TypeError):  # nobody but the watching process should write there
            facts |= json.loads(line)
    return facts


def _end(child: subprocess.Popen[bytes], command: int | None) -> None:
    """Kills whoever is left: the watching process, and the command's group where that died before it."""
    if child.poll() is None and command is not None:
        child.terminate()  # it kills what it watches
        with suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
    for group in (child.pid, command):
        if group is not None:
            with suppress(OSError):
                os.killpg(group, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def _remove(directory: Path) -> None:
    """Removes also directories that the command made unreadable, or nested too deep for Python."""
    with suppress(OSError, RecursionError):
        shutil.rmtree(directory)
        return
    for repair in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        subprocess.run([*repair, "--", str(directory)], check=False, capture_output=True)


# Runs in the sandbox: the program and its tests come by stdin, the verdict goes out on a descriptor that prints of the
# program do not reach, each line marked with a word that the program was not told.
_JUDGE: Final = r"""
import json, linecache, os, sys, traceback
task = json.load(sys.stdin)
verdict = os.fdopen(os.dup(1), "w")
nothing = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(nothing, fd)

def run(name, text, names):
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    try:
        exec(compile(text, name, "exec"), names)
    except BaseException as error:
        # Without the frames of this file: the first is the call above.
        error = error.with_traceback(error.__traceback__.tb_next)
        return "".join(traceback.format_exception(error, limit=-4))

def tell(**fact):
    verdict.write("\n" + task["mark"] + json.dumps(fact) + "\n")
    verdict.flush()

names = {"__name__": "__main__"}
error = run("<completion>", task["program"], names)
tell(test=0, error=error)
for number, test in enumerate(task["tests"] if error is None else [], 1):
    tell(test=number, error=run(f"<test {number}>", test, dict(names)))
"""


def extract_code(completion: str) -> str:
    """Returns the last fenced block of a completion, closed or cut off; all of it where there is none."""
    code, inside = None, False
    for line in completion.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                code = ""
        elif inside:
            code = (code or "") + line
    return completion if code is None else code


def code_reward(
    *, tests: str = "tests", wall_seconds: float = 10.0, memory_mb: float = 1024.0, max_feedback: int = 1_500
) -> Callable[..., tuple[float, str | None]]:
    """Makes a reward function for completions that are Python: the share of a row's tests that pass, the first error.

    The column `tests` of a row is a text or a list of texts, each a few lines that raise if the code is wrong
    (`assert add(1, 2) == 3`). The code runs once, in the sandbox, then each test in a copy of its names. The feedback
    is the traceback, at most `max_feedback` characters of its end; None where all is well.

    What the code prints is thrown away, and ending the process early passes no test; code that looks for the judge in
    the interpreter it shares with it will find it. The error text may hold what the test says, answers included.
    """

    def reward(*, prompt: object, completion: str, **columns: Any) -> tuple[float, str | None]:
        given = columns.get(tests)
        cases = [given] if isinstance(given, str) else given
        if not cases or not isinstance(cases, Sequence) or not all(isinstance(case, str) for case in cases):
            raise ArgumentError(f"column {tests!r} must be a text or a list of texts, got {given!r}")
        mark = os.urandom(16).hex()
        task = {"program": extract_code(completion), "tests": list(cases), "mark": mark}
        result = run_limited(
            python=_JUDGE,
            stdin=json.dumps(task),
            wall_seconds=wall_seconds,
            cpu_seconds=wall_seconds,
            memory_mb=memory_mb,
            max_output=1 << 20,
        )
        lines = [line.removeprefix(mark) for line in result.stdout.splitlines() if line.startswith(mark)]
        errors = {fact["test"]: fact["error"] for fact in map(json.loads, lines)}
        passed = sum(error is None for number, error in errors.items() if number)
        if passed == len(cases):
            return 1.0, None
        number = next((n for n, error in sorted(errors.items()) if error is not None), None)
        if number is None:  # it ended before a verdict on all of them
            where = "the code" if not errors else f"test {len(errors)}"
            text = f"{where} did not finish: {result.outcome}"
        else:
            text = f"{'The code' if number == 0 else f'Test {number} of {len(cases)}'} failed:\n{errors[number]}"
        return passed / len(cases), text if len(text) <= max_feedback else "…" + text[-max_feedback:]

    return reward


def python_tests(
    *, prompt: object, completion: str, tests: str | Sequence[str], **columns: Any
) -> tuple[float, str | None]:
    """Is `code_reward()` with its defaults, for the command line: `--reward sdcore.rollouts.sandbox:python_tests`."""
    return code_reward()(prompt=prompt, completion=completion, tests=tests)


def run_python(code: str) -> str:
    """
    Runs a Python program for up to ten seconds, in up to one gigabyte of memory, and returns what it printed.

    Args:
        code: the program; it knows nothing of an earlier one
    """
    result = run_limited(python=code, max_output=4_096)
    if result.ok:
        return result.stdout
    error = "" if result.exit_code is None else result.stderr.strip().rpartition("\n")[2]
    return f"{result.stdout}\nError: {error or result.outcome}".lstrip()
