"""Says what a result consists of: rows of plain numbers, the machine they were measured on, and their JSON.

A row is a contender in a case: its figures, or the reason why it has none. The bare matrix products, which are the
limit, are rows of their own.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .models import folder_name
from .shapes import Divergence, Shape

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "orda-kernel", "flash-linear-attention")
# Whether freed memory is kept, or asked for anew a page at a time, is worth up to 17 % of a step.
MALLOC_SETTINGS = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# The bare products of a head that is trained, and of one that is frozen, which has no gradient.
FLOOR, FROZEN_FLOOR = "four matmuls", "three matmuls"
FLOORS = (FLOOR, FROZEN_FLOOR)


class Outcome(NamedTuple):
    """Is what all contenders of a case must agree on."""

    values: Tensor  # () the loss; (N, H) hidden states where there is none
    gradients: dict[str, Tensor]  # by parameter, or of the output layer `hidden` (N, H) and `weight` (V, H)

    @property
    def gradient_bytes(self) -> int:
        return sum(gradient.nbytes for gradient in self.gradients.values())


Step = Callable[[], Outcome]


class Errors(NamedTuple):
    """Holds relative errors; those of the gradients norm-wise. NaN where a result is not finite."""

    loss: float
    hidden_gradient: float
    weight_gradient: float  # 0 where the head is frozen and has no gradient

    @property
    def gradient(self) -> float:
        return max(self.hidden_gradient, self.weight_gradient)


@dataclass(kw_only=True)
class SpeedRow:
    """Is a contender in a case: its times, or why there are none."""

    group: Any  # the suite's case
    contender: str
    setting: str = ""
    seconds: list[float] = field(default_factory=list)
    errors: Errors | None = None  # of the output layer; None for a floor, and for a row that did not run
    reason: str | None = None  # why it was not timed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """Returns the distance of the quartiles as a share of the median."""
        if len(self.seconds) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(kw_only=True)
class PassRow(SpeedRow):
    """Is a contender in a case of whole passes; which of the last figures there are depends on the suite."""

    gradient_error: float = math.nan
    live_bytes: int | None = None  # the peak of one pass beyond weights and inputs, gradients included
    resident_bytes: int | None = None
    gradient_bytes: int = 0
    values_error: float = math.nan  # of the states, or of the loss
    allowed: float = math.nan  # the speed-up over naive that the FLOPs allow
    needed_bytes: float = math.nan  # beyond weights and inputs, by the estimate that was made before
    ours: bool = True


@dataclass(kw_only=True)
class MemoryRow:
    """Holds the bytes of a step at its peak beyond its inputs; a gradient counts in the dtype it is returned in."""

    group: Any
    contender: str
    live_bytes: int | None = None  # counted by `LiveBytes`, or by the CUDA allocator; None inside compiled graphs
    resident_bytes: int | None = None  # growth of the process; None off Linux and on a GPU
    gradient_bytes: int = 0
    reason: str | None = None


@dataclass(kw_only=True)
class AccuracyRow:
    """Holds errors against float64 on the same inputs; `loss` itself to show its sign."""

    shape: Shape
    dtype: str
    divergence: Divergence
    noise: float
    contender: str
    errors: Errors | None = None
    loss: float = math.nan
    reason: str | None = None


AnyRow = TypeVar("AnyRow", SpeedRow, PassRow, MemoryRow)


@dataclass(kw_only=True)
class Report:
    """Holds all rows of a run of the suite `divergence`, and where and when it ran."""

    machine: dict[str, Any]
    speed: list[SpeedRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    mass: list[dict[str, Any]] = field(default_factory=list)  # of a real model's states, as `States.mass` has it


@dataclass(kw_only=True)
class PassReport:
    """Holds all rows of a run of another suite."""

    machine: dict[str, Any]
    rows: list[PassRow] = field(default_factory=list)

    def by_case(self) -> dict[Any, list[PassRow]]:
        return by_group(self.rows)


def by_group(rows: Iterable[AnyRow]) -> dict[Any, list[AnyRow]]:
    grouped: dict[Any, list[AnyRow]] = {}
    for row in rows:
        grouped.setdefault(row.group, []).append(row)
    return grouped


def describe_machine(device: str) -> dict[str, Any]:
    """Returns the name, software and settings that the times depend on."""
    machine: dict[str, Any] = {
        "kind": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if device == "cpu":
        machine["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        machine["bf16_instructions"] = bool(torch.cpu._is_avx512_bf16_supported())
        machine["cores"] = os.cpu_count()
        machine["malloc"] = {name: os.environ[name] for name in MALLOC_SETTINGS if os.environ.get(name)}
    return machine


def machine_folder(machine: Mapping[str, Any]) -> str:
    """Returns the name of the folder that a machine's results lie in."""
    threads = "" if machine["kind"] == "cuda" else f" {machine['threads']} threads"
    return folder_name(re.sub(r"\((r|tm)\)", "", machine["name"].lower()) + threads)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def rounded(value: Any) -> Any:
    """Keeps four digits: more are noise, and make the committed file larger. NaN becomes None."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


def write(path: Path, machine: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes a result with one row a line, so that a diff of two dates is readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f'"machine": {json.dumps(machine)}']
    for name, rows in tables.items():
        lines = ",\n".join(json.dumps(rounded(row)) for row in rows)
        parts.append(f'"{name}": [\n{lines}\n]')
    # Renamed when it is whole: a run that was stopped as it wrote would leave half a file.
    written = path.with_suffix(".part")
    written.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    written.replace(path)
