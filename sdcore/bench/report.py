"""What a run of the divergence suite measured, as one JSON file, read back for the tables and the README."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .live_memory import MemoryRow
from .measure import AccuracyRow
from .oracle import Errors
from .places import folder_name
from .shapes import Divergence, Group, Shape
from .timing import SpeedRow

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "orda-kernel", "flash-linear-attention")


@dataclass(kw_only=True)
class Report:
    """All rows of a run, and where and when it ran."""

    machine: dict[str, Any]
    speed: list[SpeedRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)

    @property
    def device(self) -> str:
        """The directory's name."""
        threads = "" if self.machine["kind"] == "cuda" else f" {self.machine['threads']} threads"
        name = re.sub(r"\((r|tm)\)", "", self.machine["name"].lower())
        return folder_name(name + threads)


# Whether freed memory is kept, or asked for anew a page at a time, is worth up to 17 % of a step.
MALLOC_SETTINGS = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def describe_machine(device: str) -> dict[str, Any]:
    """Name, software and settings that the times depend on."""
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
    """Four digits: more are noise, and make the committed file larger."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if value == value else None
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: rounded(rows) for name, rows in asdict(report).items() if name != "machine"}
    # One row per line: a diff of two dates is readable.
    parts = [f'"machine": {json.dumps(report.machine)}']
    for name, entries in rows.items():
        lines = ",\n".join(json.dumps(_flat(entry)) for entry in entries)
        parts.append(f'"{name}": [\n{lines}\n]')
    # Renamed when it is whole: a run that was stopped as it wrote could not go on.
    written = path.with_suffix(".part")
    written.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    written.replace(path)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    # `asdict` turns the NamedTuple of a group into a list.
    if "group" in entry:
        shape, dtype, divergence, frozen = entry.pop("group")
        head = {"frozen_head": True} if frozen else {}
        entry = {"shape": shape, "dtype": dtype, "divergence": divergence} | head | entry
    return entry


def load(path: Path) -> Report:
    stored = json.loads(path.read_text())
    report = Report(machine=stored["machine"])
    for entry in stored["speed"]:
        report.speed.append(SpeedRow(group=_take_group(entry), **_with_errors(entry)))
    for entry in stored["memory"]:
        report.memory.append(MemoryRow(group=_take_group(entry), **entry))
    for entry in stored["accuracy"]:
        shape, divergence = Shape(*entry.pop("shape")), Divergence(**entry.pop("divergence"))
        entry["loss"] = float("nan") if entry["loss"] is None else entry["loss"]
        report.accuracy.append(AccuracyRow(shape=shape, divergence=divergence, **_with_errors(entry)))
    return report


def _take_group(entry: dict[str, Any]) -> Group:
    divergence, frozen = Divergence(**entry.pop("divergence")), entry.pop("frozen_head", False)
    return Group(Shape(*entry.pop("shape")), entry.pop("dtype"), divergence, frozen)


def _with_errors(entry: dict[str, Any]) -> dict[str, Any]:
    errors = entry.pop("errors")
    if errors is not None:
        errors = Errors(*(float("nan") if error is None else error for error in errors))
    return entry | {"errors": errors}


__all__ = ["Report", "describe_machine", "load", "rounded", "save"]
