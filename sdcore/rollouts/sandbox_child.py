"""Stands, as a process, between ours and a limited command: sets limits, watches the clock, leaves nobody behind.

    python -I -S sandbox_child.py STATUS_FD LIMITS_JSON COMMAND [ARGUMENT ...]

It is a process of its own for two reasons. Limits set between fork and exec of a process with threads, as ours is,
can deadlock; here there are none. And only the parent of a process hears of it: this one is the *subreaper* of
all that the command starts, also of what leaves its session, and kills it when the command ends or its time is up.

One JSON object a line goes to STATUS_FD: {"pid": ...}, then {"exit": code} or {"signal": number} or {"error": text},
with "timed_out". Imports the standard library only, and nothing of ours: it is run as a file.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MIB = 1 << 20
WATCHED = {signal.SIGCHLD, signal.SIGTERM}
CLEARING_SECONDS = 5.0  # for killing what the command left


def main(arguments: list[str]) -> None:
    status_fd, limits, command = int(arguments[0]), json.loads(arguments[1]), arguments[2:]
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # ours was killed: end as after a time-out
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    os.set_inheritable(status_fd, False)
    deadline = time.monotonic() + limits["wall_seconds"]
    child = os.fork()
    if child == 0:
        start(command, limits, status_fd, prctl)
    tell(status_fd, {"pid": child})
    status = wait_for(child, deadline)
    clear(child)
    verdict: dict[str, object] = {"timed_out": status is None}
    if status is not None:
        verdict |= {"exit": os.WEXITSTATUS(status)} if os.WIFEXITED(status) else {"signal": os.WTERMSIG(status)}
    tell(status_fd, verdict)


def start(command: list[str], limits: dict[str, float], status_fd: int, prctl: object) -> None:
    """Becomes the command; never returns."""
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # type: ignore[operator]
        # The interpreter ignores these two, and ignored signals stay ignored in the command.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        cpu = max(1, int(limits["cpu_seconds"] + 0.999))
        limit(resource.RLIMIT_CPU, cpu, cpu + 1)  # first SIGXCPU, which can be caught, then SIGKILL
        limit(resource.RLIMIT_FSIZE, int(limits["file_mb"] * MIB))
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_NOFILE, int(limits["open_files"]))
        limit(resource.RLIMIT_NPROC, tasks_of_user() + int(limits["processes"]))
        limit(resource.RLIMIT_AS, int(limits["memory_mb"] * MIB))
        os.execvpe(command[0], command, dict(os.environ))
    except BaseException as error:
        tell(status_fd, {"error": f"{command[0]}: {getattr(error, 'strerror', None) or error}"})
    finally:
        os._exit(127)


def limit(which: int, soft: int, hard: int | None = None) -> None:
    """Sets a limit, as far as the one that we are under ourselves allows."""
    _, most = resource.getrlimit(which)
    cap = (lambda value: value) if most == resource.RLIM_INFINITY else (lambda value: min(value, most))
    resource.setrlimit(which, (cap(soft), cap(soft if hard is None else hard)))


def tasks_of_user() -> int:
    """Counts a user's processes and threads, as the kernel's limit does, and not those of a command."""
    count, user = 0, os.getuid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # ended meanwhile
            continue
    return count


def wait_for(child: int, deadline: float) -> int | None:
    """Returns the command's wait status; None if its time was up, or if we are to stop."""
    while True:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid == child:
                return status
            if pid == 0:
                break
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        heard = signal.sigtimedwait(WATCHED, left)
        if heard is not None and heard.si_signo == signal.SIGTERM:
            return None


def clear(child: int) -> None:
    """Kills the command's group and then, generation by generation, whoever became ours when its parent died."""
    with suppress(OSError):  # nobody is left in it, or it has not made it yet
        os.killpg(child, signal.SIGKILL)
    until = time.monotonic() + CLEARING_SECONDS
    while time.monotonic() < until:
        ours = children()
        for pid in ours:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def children() -> list[int]:
    """Returns the processes whose parent we are."""
    pids, ours = [], os.getpid()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            # The name, in parentheses, may hold anything; state and parent follow the last one.
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == ours:
            pids.append(int(name))
    return pids


def tell(status_fd: int, fact: dict[str, object]) -> None:
    os.write(status_fd, json.dumps(fact).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
