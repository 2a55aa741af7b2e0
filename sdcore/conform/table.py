"""Writes what a run found: `conformance.json`, and `conformance.md`, which is made of it alone."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from .adapters import ADAPTERS
from .runner import ABSENT, CLEAR, CRASHED, FLOORS, OFF, RIGHT, SECONDS, UNCLEAR, Result
from .situations import SITUATIONS

KINDS: Final = (RIGHT, OFF, CLEAR, UNCLEAR, CRASHED, ABSENT)
FAILURES: Final = (OFF, UNCLEAR, CRASHED)
SHORT: Final = {RIGHT: "✓", CLEAR: "refused", UNCLEAR: "unclear", CRASHED: "crashed", ABSENT: "–"}
INTRODUCTION: Final = """# Conformance of distillation losses

What `sdcore conform --all` found: {situations} situations, each one call of a distillation loss on small seeded inputs
with a float64 truth, asked of everybody. Made by that command of [conformance.json](conformance.json), never by hand.
Run on {date} on a CPU, with Triton's kernels in its interpreter: nothing here is about a GPU.

{machine}; {versions}.

- **✓** loss and gradients are as near to float64 as rounding leaves them, relative, by norm: {floors}.
  This is at least four times what textbook code in plain torch is off by wherever that code is right at all.
- **a number**: off by so much of the truth; *accepted*: a call without meaning returned a number. Most wrong numbers
  below are small, and many of them belong to textbook code as well, which has a column: read them as what a run
  in that situation would meet, not as a rank.
- **refused**: an error that names what is wrong; **unclear**: an error that does not; **crashed**: the process died or
  said nothing for {seconds} seconds. **–** the peer does not offer it, which is no failure.

Peers are called as their documentation says, with the options that mean the situation's divergence; the calls are in
`sdcore/conform/adapters.py`. Peers that take logits get them in the dtype of the hidden states, as from a model
that is itself in that dtype. What a trainer's configuration checks counts as checked. Corrections are welcome.
"""
OUTSIDE: Final = """## Not run

- Teachers with *fewer* rows than the student, or smaller vocabularies: kernels that do not compare the shapes would
  read past the end of a tensor. What they do with more rows is in the table.
- Ids outside of the vocabulary, for the same reason.
"""


def document(found: Mapping[str, Mapping[str, Result]], missing: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Returns what is written as JSON."""
    packages = sorted({adapter.package for name, adapter in ADAPTERS.items() if name not in missing})
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {package: _version(package) for package in packages},
        "seconds": round(seconds),
        "floors": FLOORS,
        "missing": dict(missing),
        "peers": {peer: {name: _plain(result) for name, result in results.items()} for peer, results in found.items()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout of ours
        return None


def _plain(result: Result) -> list[Any]:
    off = None if result.off is None else float(f"{result.off:.2e}")
    return [result.kind, off, result.note]


def write(folder: Path, content: Mapping[str, Any]) -> list[Path]:
    """Writes both files and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "conformance.json", folder / "conformance.md"]
    # A result a line, so that a difference between two runs can be read.
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    paths[1].write_text(rendered(content), encoding="utf-8")
    return paths


def rendered(content: Mapping[str, Any]) -> str:
    """Returns the page for what `document` made."""
    peers = {name: {s: Result(*r) for s, r in results.items()} for name, results in content["peers"].items()}
    versions = ", ".join(f"{package} {number}" for package, number in content["versions"].items() if number)
    floors = ", ".join(f"{floor:g} in {dtype}" for dtype, floor in content["floors"].items())
    head = INTRODUCTION.format(
        situations=len(next(iter(peers.values()))),
        date=content["date"],
        machine=content["machine"],
        versions=versions,
        floors=floors,
        seconds=SECONDS,
    )
    parts = [head, "## How many\n", _table(("", *KINDS), _counts(peers)), "", "## All situations\n"]
    rows = [(name, *(cell(results[name]) for results in peers.values())) for name in next(iter(peers.values()))]
    parts += [_table(("", *peers), rows), "", "## What fails, and what it looks like\n"]
    parts += [_failures(name, results) for name, results in peers.items()]
    parts += [f"- {name}: {reason}." for name, reason in content["missing"].items()]
    return "\n".join([*parts, OUTSIDE])


def cell(result: Result) -> str:
    """Returns a result in a word or a number."""
    if result.kind != OFF:
        return SHORT[result.kind]
    if result.off is not None:
        return f"**{result.off:.1f}**" if "matrices" in result.note else f"**{result.off:.1e}**"
    return f"**{'accepted' if result.note == 'accepted' else 'NaN'}**"


def _counts(peers: Mapping[str, Mapping[str, Result]]) -> list[tuple[str, ...]]:
    counted = {name: Counter(result.kind for result in results.values()) for name, results in peers.items()}
    return [(name, *(str(counts[kind] or "") for kind in KINDS)) for name, counts in counted.items()]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(header), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _failures(peer: str, results: Mapping[str, Result]) -> str:
    """Lists a peer's failures by what a user would see, which several situations may share."""
    seen: dict[str, list[str]] = {}
    for name, result in results.items():
        if result.kind in FAILURES:
            seen.setdefault(SITUATIONS[name].symptom if result.kind == OFF else "", []).append(_said(name, result))
    lines = [f"- {symptom[:1].upper()}{symptom[1:]}: {'; '.join(names)}." for symptom, names in seen.items() if symptom]
    lines += [
        f"- An error that does not say what is wrong: {'; '.join(names)}." for names in [seen.get("", [])] if names
    ]
    return "\n".join([f"### {peer}\n", *(lines or ["Nothing."]), ""])


def _said(name: str, result: Result) -> str:
    if result.kind != OFF:
        note = result.note.replace("|", "\\|").replace("<", "&lt;").rstrip(".")
        return f"{name} ({note[:120]})"
    if result.off is None:
        return f"{name} ({result.note})"
    if "matrices" in result.note:
        return f"{name} ({result.off:.1f} {result.note} for each that the rows would fill)"
    return f"{name} ({result.off:.1e}, {result.note})"
