"""Do the steps of the plan, each part once: what is done stays done, and what was not reached is said.

A folder holds a run: `<step>/<part>/` has the results of a part, its `log.txt`, and `done.json` once it is finished. A
second start goes on where the first was stopped, by its seconds, an interruption or the machine; a part that failed is
tried again. The folder is one device's: of another one it is refused.

What differs from the obvious: nothing here imports torch, since a CUDA context beside those of the parts would take
memory from them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn

from ...errors import ArgumentError
from ..places import checkout
from .plan import CPU, CUDA, TABLE, Step

DONE, FAILED, LOG, MACHINE = "done.json", "failed.json", "log.txt", "machine.json"
TABLES: Final = "tables"  # of the run, as of the package
ARCHIVE: Final = "gpu-run.tar.gz"
# Not worth the start of a process.
LEAST_SECONDS: Final = 15.0
# For a part that is stopped to end by itself.
GRACE_SECONDS: Final = 5.0
TAIL_LINES: Final = 15


class Part(NamedTuple):
    """What became of a part; `state` is done, failed or not reached."""

    step: str
    name: str
    state: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one start."""

    mode: str  # cuda or cpu
    folder: Path
    seconds: float  # of the whole start
    command: Sequence[str]  # that runs a part, before its arguments
    out: Path | None = None  # a folder that takes the archive
    say: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: T201


def listed(steps: Sequence[Step], settings: Settings) -> list[Part]:
    """The parts of the steps, as the folder says."""
    found = []
    for step in steps:
        for name in step.parts_in(settings.mode):
            folder = settings.folder / step.name / name
            done, failed = (_stored(folder / file) for file in (DONE, FAILED))
            if done is not None:
                found.append(Part(step.name, name, "done", f"{done['seconds']:.0f} s"))
            elif failed is not None:
                found.append(Part(step.name, name, "failed", failed["why"]))
            else:
                found.append(Part(step.name, name, "not reached"))
    return found


def show(steps: Sequence[Step], settings: Settings) -> list[str]:
    """Lines: each step with its limit, and each of its parts with what became of it."""
    parts = listed(steps, settings)
    lines = [
        f"{settings.mode} run in {settings.folder}, at most {settings.seconds:.0f} s of "
        f"{sum(step.limit(settings.mode) for step in steps)} s"
    ]
    for step in steps:
        lines.append(f"{step.name}, {step.limit(settings.mode)} s: {step.about}")
        for part in parts:
            if part.step == step.name:
                lines.append(f"  {part.state:12}{part.name}" + (f" ({part.note})" if part.note else ""))
    for state in ("done", "failed", "not reached"):
        names = [f"{part.step}/{part.name}" for part in parts if part.state == state]
        lines.append(f"{state}: {len(names)}" + (f" – {', '.join(names)}" if names and state != "done" else ""))
    return lines


def run(steps: Sequence[Step], settings: Settings) -> list[Part]:
    """Do what is not done yet; returns the state of all parts. Raises `ArgumentError` for another device's folder."""
    ends = time.monotonic() + settings.seconds
    settings.folder.mkdir(parents=True, exist_ok=True)
    _same_machine(settings)
    _install_tables(settings)
    with _ended_by_signals():
        try:
            for step in steps:
                _step(step, settings, ends)
                archive(settings)
        except KeyboardInterrupt:
            settings.say("interrupted; start again to go on")
    return listed(steps, settings)


def _step(step: Step, settings: Settings, ends: float) -> None:
    step_ends = min(ends, time.monotonic() + step.limit(settings.mode))
    did_any = False
    for name in step.parts_in(settings.mode):
        folder = settings.folder / step.name / name
        if (folder / DONE).exists() and not (name == TABLE and did_any):
            continue
        left = step_ends - time.monotonic()
        if left < LEAST_SECONDS:
            settings.say(f"{step.name}/{name}: not started, {max(left, 0):.0f} s are left")
            continue
        did_any |= _part(step.name, name, settings, left)


def _part(step: str, name: str, settings: Settings, seconds: float) -> bool:
    """Run one part for at most so long; whether it finished."""
    folder = settings.folder / step / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in (DONE, FAILED):
        (folder / file).unlink(missing_ok=True)
    settings.say(f"{step}/{name}: at most {seconds:.0f} s")
    began = time.monotonic()
    arguments = [step, name, "--mode", settings.mode, "--folder", str(settings.folder), "--seconds", f"{seconds:.0f}"]
    with (folder / LOG).open("a") as log:
        process = subprocess.Popen(
            [*settings.command, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(settings.mode),
        )
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                _stop(process)
    taken = time.monotonic() - began
    if status == 0:
        (folder / DONE).write_text(json.dumps({"seconds": round(taken, 1), "at": time.strftime("%Y-%m-%dT%H:%M:%S")}))
        settings.say(f"{step}/{name}: done, {taken:.0f} s")
        return True
    if status is None:
        settings.say(f"{step}/{name}: stopped after {taken:.0f} s; another start goes on with it")
        return False
    why = f"exit {status} after {taken:.0f} s, see {folder / LOG}"
    (folder / FAILED).write_text(json.dumps({"why": why}))
    tail = (folder / LOG).read_text(errors="replace").splitlines()[-TAIL_LINES:]
    settings.say("\n".join([f"{step}/{name}: failed, {why}", *(f"    {line}" for line in tail)]))
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A request to end is an interruption: the part is stopped, and the list printed."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(mode: str) -> dict[str, str]:
    root = _root()
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    interpreter = {"TRITON_INTERPRET": "1"} if mode == CPU else {}
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | interpreter


def _root() -> Path:
    root = checkout()
    if root is None:
        raise ArgumentError("a GPU run needs a checkout of sdcore, and this sdcore is an installed package")
    return root


def _same_machine(settings: Settings) -> None:
    """Note the device in the folder, or compare with the one that is noted there."""
    found = subprocess.run(
        [*settings.command, "machine", "machine", "--mode", settings.mode, "--folder", str(settings.folder)],
        env=_environment(settings.mode),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if found.returncode:
        raise ArgumentError(f"a {settings.mode} run needs a Python whose torch has that device, got {sys.executable}")
    machine = json.loads(found.stdout.splitlines()[-1])
    settings.say(", ".join(f"{name} {value}" for name, value in machine.items()))
    noted = _stored(settings.folder / MACHINE)
    if noted is not None and noted["device"] != machine["device"]:
        raise ArgumentError(
            f"folder must be of this device, {machine['device']}, or new; {settings.folder} is of {noted['device']}"
        )
    (settings.folder / MACHINE).write_text(json.dumps(machine) + "\n")


def _install_tables(settings: Settings) -> None:
    """What was tuned in this run, on a machine that has a fresh copy of the sources."""
    if settings.mode != CUDA:
        return
    for table in (settings.folder / TABLES).glob("*.json"):
        installed = _root() / "kernels" / "sdkernels" / TABLES / table.name
        installed.parent.mkdir(exist_ok=True)
        shutil.copy(table, installed)


def archive(settings: Settings) -> None:
    """The whole folder as one file: a lent machine gives few files back. Written beside it and then renamed."""
    if settings.out is None:
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    part = settings.out / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz") as packed:
        packed.add(settings.folder, arcname=settings.folder.name)
    part.rename(settings.out / ARCHIVE)


def _stored(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


__all__ = ["Part", "Settings", "archive", "listed", "run", "show"]
