"""Reads what was measured on a device about how to launch: block sizes of the kernels, and a pass's workspace.

One JSON file an architecture in `tables/`, written by `tuning`, says where and with what it was measured. What
`backend="auto"` launches follows it where there is one, and the untuned numbers of `triton_backend/configs.py` and
`driver/call.py` where there is none. No result depends on it beyond rounding.

What differs from the obvious: files are read once, when the package is imported, so that a traced call reads none; a
file that is not such a table makes that import fail, with what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch

FOLDER: Final = Path(__file__).resolve().parents[1] / "tables"
# What may be measured: a compute capability, or one of the others.
ARCHITECTURE: Final = re.compile(r"sm_\d+|rocm|interpreter")
KERNELS: Final = ("row_statistics", "divergence", "divergence_clipped", "softmax_gradient")
# How far V and H may be from those that a workspace was measured at: elsewhere the rule of `driver/call.py` holds.
NEAR: Final = 2.0


class KernelRow(NamedTuple):
    """Holds the fastest launch of a kernel at rows of V entries."""

    vocab: int
    block: int  # vocabulary entries of a block, a power of two
    warps: int
    stages: int


class WorkspaceRow(NamedTuple):
    """Holds the smallest workspace that is about as fast as any, for a head (V, H) that is trained."""

    vocab: int
    hidden: int
    megabytes: int


Row = TypeVar("Row", KernelRow, WorkspaceRow)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Is a file of `tables/`."""

    architecture: str  # one of ARCHITECTURES
    device: str
    torch: str
    triton: str
    date: str
    kernels: Mapping[str, tuple[KernelRow, ...]]  # by one of KERNELS; what is missing is launched untuned
    workspace: tuple[WorkspaceRow, ...] = ()

    def launch(self, kernel: str, vocab: int) -> KernelRow | None:
        """Returns the row whose V is nearest, by their ratio; None where the kernel was not tuned."""
        return _nearest(self.kernels.get(kernel, ()), lambda row: abs(math.log(row.vocab / max(vocab, 1))))

    def workspace_mb(self, vocab: int, hidden: int) -> int | None:
        """Returns what suits the nearest measured head; None where none is near."""
        row = _nearest(
            self.workspace,
            lambda row: max(abs(math.log(row.vocab / max(vocab, 1))), abs(math.log(row.hidden / max(hidden, 1)))),
            most=math.log(NEAR),
        )
        return None if row is None else row.megabytes


def chip(device: torch.device) -> str:
    """Says under which name a device is measured."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "rocm"
    if device.type != "cuda":
        return "sm_80"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def architecture(device: torch.device) -> str:
    """Says what a device is launched as where nothing was measured: its chip, or an older one of the same kind."""
    name = chip(device)
    if not name.startswith("sm_"):
        return name
    capability = int(name.removeprefix("sm_"))
    return "sm_100" if capability >= 100 else "sm_90" if capability >= 90 else "sm_80"


def table_for(device: torch.device) -> Table | None:
    """Returns what was measured on a device's chip, or on another one of its generation; None where nothing was."""
    # Without any table nothing is asked of the device, also not while a call is being traced.
    if not _current:
        return None
    name, kind = chip(device), architecture(device)
    # An sm_120 has half of the shared memory of an sm_100.
    return table_of(name) or (table_of(kind) if name[:-1] == kind[:-1] else None)


def table_of(name: str) -> Table | None:
    """Returns the table of an architecture, where one was measured."""
    return _current.get(name)


@contextmanager
def using(*tables: Table) -> Iterator[None]:
    """Makes these tables hold in the block, and no others: how the tuner tries a launch. Not for several threads."""
    before = dict(_current)
    _current.clear()
    _current.update({table.architecture: table for table in tables})
    try:
        yield
    finally:
        _current.clear()
        _current.update(before)


def read(path: Path) -> Table:
    """Reads a table; raises `ValueError`, which names the file and what is wrong with it."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _wrong(path, f"it is not JSON: {error}") from error
    expected = {field.name for field in fields(Table)}
    if not isinstance(stored, dict) or set(stored) != expected:
        came = sorted(stored) if isinstance(stored, dict) else type(stored).__name__
        raise _wrong(path, f"it must be an object with {', '.join(sorted(expected))}, got {came}")
    for name in ("device", "torch", "triton", "date"):
        if not isinstance(stored[name], str) or not stored[name]:
            raise _wrong(path, f"{name} must be a text, got {stored[name]!r}")
    if not ARCHITECTURE.fullmatch(str(stored["architecture"])):
        raise _wrong(
            path,
            f"architecture must be sm_ and a compute capability, rocm or interpreter, got {stored['architecture']!r}",
        )
    if path.stem != stored["architecture"]:
        raise _wrong(path, f"it is of {stored['architecture']}, so its name must be {stored['architecture']}.json")
    kernels = stored["kernels"]
    if not isinstance(kernels, dict) or not set(kernels) <= set(KERNELS):
        raise _wrong(path, f"kernels must be an object by {', '.join(KERNELS)}, got {kernels!r}")
    by_kernel = {name: _rows(path, f"kernels.{name}", rows, KernelRow) for name, rows in kernels.items()}
    for name, rows in by_kernel.items():
        for row in rows:
            for part, size in (("block", row.block), ("warps", row.warps)):
                if size & (size - 1):
                    raise _wrong(path, f"{part} of kernels.{name} must be a power of two, got {size}")
    return Table(
        **stored | {"kernels": by_kernel, "workspace": _rows(path, "workspace", stored["workspace"], WorkspaceRow)}
    )


def write(table: Table, folder: Path) -> Path:
    """Writes a table as `read` takes it; returns the path, which the architecture names."""
    stored = asdict(table) | {
        "kernels": {name: [row._asdict() for row in rows] for name, rows in table.kernels.items()},
        "workspace": [row._asdict() for row in table.workspace],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table.architecture}.json"
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return path


def _rows(path: Path, name: str, rows: Any, row_type: type[Row]) -> tuple[Row, ...]:
    if not isinstance(rows, list):
        raise _wrong(path, f"{name} must be a list, got {rows!r}")
    for row in rows:
        whole = isinstance(row, dict) and set(row) == set(row_type._fields)
        if not whole or not all(type(number) is int and number > 0 for number in row.values()):
            raise _wrong(path, f"{name} must have positive integers {', '.join(row_type._fields)} a row, got {row!r}")
    return tuple(row_type(**row) for row in rows)


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is not a table of sdkernels.tuning: {what}; delete it, or tune again")


def _nearest(rows: Iterable[Row], distance: Any, most: float = math.inf) -> Row | None:
    nearest = min(rows, key=distance, default=None)
    return nearest if nearest is not None and distance(nearest) <= most else None


_current: dict[str, Table] = {table.architecture: table for table in map(read, sorted(FOLDER.glob("*.json")))}
