"""Writes and reads the files of a run: `metrics.jsonl`, `samples.jsonl` and `run.json` in its output directory.

    log = RunLog("out")                                   # a new run; a resumed one: RunLog("out", resume_step=200)
    log.describe({"method": method, "model": name})       # run.json
    log.metrics(1, {"student/entropy": 2.1}, samples=8, tokens=1024)
    read_run("out").metrics[-1]["student/entropy"]

A line is written with one call and is in the operating system's hands when it returns, so a killed process loses at
most the line that it was writing. Such a torn line is dropped when the run is resumed or read. The lines later than a
checkpoint's step go too when a run resumes from it, or it would log those steps twice.

What differs from the obvious: JSON has no NaN and no infinity, and most readers refuse them. Such a value is written as
null, and the line says under "nonfinite" which it was. A new run in the directory of an older one moves that one's
files aside (`metrics.jsonl.1`, ...) when it first writes; it never overwrites them.

Not covered: several processes that write one log (let rank 0 do it), and power cuts, after which the last lines may be
missing. Imports no torch, so that a report starts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ArgumentError, SdcoreError

METRICS: Final = "metrics.jsonl"
SAMPLES: Final = "samples.jsonl"
DESCRIPTION: Final = "run.json"
RESERVED: Final = frozenset({"step", "samples", "tokens", "time", "nonfinite"})
PACKAGES: Final = ("sdcore", "torch", "transformers", "accelerate", "peft", "trl", "vllm", "triton")


class RunLogError(SdcoreError, OSError):
    """Says that the log of a run could not be written or read: a full disk, a missing directory, no permission."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Holds what `read_run` read."""

    directory: Path
    metrics: list[dict[str, Any]]  # in the order of the file
    samples: list[dict[str, Any]]
    description: dict[str, Any]  # {} where there is no run.json
    unreadable: int = 0  # lines that are no JSON object, and were left out


class RunLog:
    """Appends to a run's files. Raises `RunLogError` where that fails, with the file and what to do.

    `resume_step` is the step of the checkpoint that the run goes on from; None starts a new run. Nothing in the
    directory changes before the first write.
    """

    def __init__(self, output_dir: str | Path, *, resume_step: int | None = None) -> None:
        if resume_step is not None and resume_step < 0:
            raise ArgumentError(f"resume_step must be at least 0, got {resume_step}")
        self.directory = Path(output_dir)
        self.resume_step = resume_step
        self._opened = False
        self._last_step = dict.fromkeys((METRICS, SAMPLES), -1 if resume_step is None else resume_step)
        self._started = time.monotonic()
        self._earlier = 0.0  # seconds of the run before it was resumed
        with _reported(self.directory, "create"):
            self.directory.mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, values: Mapping[str, Any], *, samples: int, tokens: int) -> None:
        """Appends a line of `metrics.jsonl`.

        `samples` and `tokens` are completions and completion tokens since the run began. Values are numbers, tensors of
        one element, or None; one step may have several lines. Raises `ArgumentError` for a step that goes back, a name
        that the line itself needs, and a value that is no number.
        """
        self._check_step(METRICS, step)
        numbers = {}
        for name, value in values.items():
            if name in RESERVED:
                raise ArgumentError(f"a metric must not be called {', '.join(sorted(RESERVED))}, got {name!r}")
            numbers[name] = _number(name, value)
        bad = {name: str(value) for name, value in numbers.items() if value is not None and not math.isfinite(value)}
        self._open()
        seconds = round(self._earlier + time.monotonic() - self._started, 3)
        line: dict[str, Any] = {"step": step, "samples": samples, "tokens": tokens, "time": seconds}
        self._append(METRICS, [line | numbers | ({"nonfinite": bad} if bad else {})])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends a line of `samples.jsonl` for each completion that is shown. Raises `ArgumentError` as `metrics`.

        A row has some of "prompt", "privileged_context", "completion", "tokens" (a text per token), "per_token" (their
        divergences, as many), "reward", "feedback", "active", "by_teacher" and, where it has several, "turns": at which
        token each begins ("start"), whether it is the student's ("own"), and its "text".
        """
        self._check_step(SAMPLES, step)
        for i, row in enumerate(rows):
            tokens, values = row.get("tokens"), row.get("per_token")
            if tokens is not None and values is not None and len(tokens) != len(values):
                raise ArgumentError(
                    f"rows[{i}] must have a divergence per token, got {len(tokens)} tokens and {len(values)} values"
                )
        self._open()
        self._append(SAMPLES, [{"step": step} | dict(row) for row in rows])

    def describe(self, values: Mapping[str, Any]) -> None:
        """Adds to `run.json`, or replaces what is there under the same names. Dataclasses, paths and sets are fine."""
        self._open()
        path = self.directory / DESCRIPTION
        known = _read_object(path)
        known.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        known["versions"] = _versions()
        text = json.dumps(_plain(known | dict(values)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with _reported(path, "write"):
            _replace(path, text.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON writes it

    def _check_step(self, name: str, step: int) -> None:
        if step < self._last_step[name]:
            raise ArgumentError(f"step must not go back: {name} is at {self._last_step[name]}, got {step}")

    def _open(self) -> None:
        """Repairs and cuts the files of a resumed run, or moves those of an older one aside, before the first write."""
        if self._opened:
            return
        if self.resume_step is None:
            self._move_aside()
        else:
            for name in (METRICS, SAMPLES):
                self._cut(self.directory / name, self.resume_step)
            done = [line.get("time") for line in _lines(self.directory / METRICS)[0]]
            self._earlier = max((value for value in done if isinstance(value, int | float)), default=0.0)
        self._opened = True

    def _move_aside(self) -> None:
        present = [path for name in (METRICS, SAMPLES, DESCRIPTION) if (path := self.directory / name).exists()]
        if not present:
            return
        # One number for all of them, which none of them has yet.
        taken = {path.suffix for path in self.directory.glob("*.json*.*")}
        number = next(n for n in range(1, len(taken) + 2) if f".{n}" not in taken)
        for path in present:
            with _reported(path, "rename"):
                path.rename(path.with_name(f"{path.name}.{number}"))

    @staticmethod
    def _cut(path: Path, last_step: int) -> None:
        if not path.exists():
            return
        with _reported(path, "read"):
            whole = path.read_bytes()
        kept = [
            raw
            for raw in whole.splitlines(keepends=True)
            # A line in the middle that cannot be read is not ours to drop; the torn one is the last.
            if (line := _object(raw)) is None or not isinstance(line.get("step"), int) or line["step"] <= last_step
        ]
        if kept and (not kept[-1].endswith(b"\n") or _object(kept[-1]) is None):
            kept.pop()
        if (wanted := b"".join(kept)) != whole:
            with _reported(path, "write"):
                _replace(path, wanted)

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if not lines:
            return
        path = self.directory / name
        data = "".join(
            # Also the separators that JSON allows but str.splitlines and some readers take for the end of a line.
            json.dumps(_plain(line), ensure_ascii=True, allow_nan=False) + "\n"
            for line in lines
        ).encode()
        with _reported(path, "write"):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(file).st_size
                try:
                    left = memoryview(data)
                    while left:
                        left = left[os.write(file, left) :]
                except OSError:
                    # Half a line would spoil the next one.
                    with contextlib.suppress(OSError):
                        os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
        self._last_step[name] = int(lines[-1]["step"])


def read_run(directory: str | Path) -> RunData:
    """Reads the files of a run, as far as they are there. Raises `RunLogError` for a directory without any of them."""
    directory = Path(directory)
    if not any((directory / name).is_file() for name in (METRICS, SAMPLES, DESCRIPTION)):
        raise RunLogError(f"{directory} must be the output directory of a run, with a {METRICS}; it has none")
    metrics, bad_metrics = _lines(directory / METRICS)
    samples, bad_samples = _lines(directory / SAMPLES)
    return RunData(
        directory=directory,
        metrics=metrics,
        samples=samples,
        description=read_description(directory),
        unreadable=bad_metrics + bad_samples,
    )


def read_description(directory: str | Path) -> dict[str, Any]:
    """Reads `run.json`; {} where there is none that can be read."""
    return _read_object(Path(directory) / DESCRIPTION)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the lines that are objects with a step, and counts the others."""
    if not path.is_file():
        return [], 0
    with _reported(path, "read"):
        raw = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    lines = [line for text in raw if (line := _object(text)) is not None and isinstance(line.get("step"), int)]
    return lines, len(raw) - len(lines)


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with _reported(path, "read"):
        return _object(path.read_bytes()) or {}


def _replace(path: Path, data: bytes) -> None:
    """Writes a whole file, such that there is either the old or the new one whatever happens."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


@contextlib.contextmanager
def _reported(path: Path, deed: str) -> Iterator[None]:
    try:
        yield
    except RunLogError:
        raise
    except OSError as error:
        raise RunLogError(
            error.errno,
            f"could not {deed} the run's log ({error.strerror or error}); what was logged before is intact, and the "
            "run can be resumed from its last checkpoint",
            str(path),
        ) from error


def _number(name: str, value: Any) -> float | int | None:
    number = value
    if hasattr(value, "item"):  # a tensor or a numpy scalar
        with contextlib.suppress(ValueError, RuntimeError, TypeError):
            number = value.item()
    if number is None or isinstance(number, int | float):
        return int(number) if isinstance(number, bool) else number
    raise ArgumentError(f"metric {name!r} must be a number, got {type(value).__name__} {value!r:.60}")


def _plain(value: Any) -> Any:
    """Turns a value into what JSON can say: numbers that are not finite become null, what it does not know its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Set):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # a tensor or an array, of any number of dimensions
        return _plain(value.tolist())
    return str(value)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
