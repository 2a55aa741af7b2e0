"""What a GPU run has to come to, and what it came to: read from the files of its parts.

    goals_table(read(Path("build/gpu-run")))     # Markdown: goal, measured, met or missed

A goal counts as met or missed only by rows of a CUDA device at its own shape; what is measured in part says which part.
docs/gpu.md has the table of the newest committed run (`benchmarks/results/<device>/gpu`), today of none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from ...errors import ArgumentError
from .. import prefix, step
from ..live_memory import GIB
from ..peers import LIGER, SDCORE, TRL
from ..places import checkout
from ..prefix import PrefixRow
from ..prefix_cases import WORKS
from ..readme import Block
from ..report import Report, load
from ..shapes import FULL_VOCABULARY, GOAL_SHAPES, JSD, Divergence, Group
from ..tables import by_group, describe, floor_seconds, format_error
from ..timing import SpeedRow
from .curve import MEGABYTES, MOST_MEGABYTES, Head, curve_table, curves, recommended
from .naive_step import NAIVE
from .parts import PREFIX_CASES

# Of the matrix products' speed, by H.
SHARES: Final = {4096: 0.85, 2560: 0.80, 1024: 0.70}
FROZEN_MEGABYTES: Final = 256
TRL_KL, TRL_JSD, LIGER_ALL = 1.5, 2.0, 3.0
PREFIX_SHARE: Final = 0.85
MET, MISSED, MEASURED, IN_PART, NOT_MEASURED = "met", "missed", "measured", "measured in part", "not measured"


@dataclass
class Results:
    """The rows of a run, of whatever was measured; empty without a CUDA device."""

    machine: dict[str, Any] = field(default_factory=dict)
    divergence: Report = field(default_factory=lambda: Report(machine={}))
    workspace: Report = field(default_factory=lambda: Report(machine={}))
    prefix: list[PrefixRow] = field(default_factory=list)
    step: list[step.StepRow] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)


class Verdict(NamedTuple):
    status: str
    measured: str = ""


class Goal(NamedTuple):
    name: str
    judge: Callable[[Results], Verdict]


def read(folder: Path | None) -> Results:
    """Of the parts that lie there; nothing for None, and for parts that did not run on a CUDA device."""
    found = Results()
    if folder is None:
        return found
    for path in sorted(folder.glob("*/*/*.json")):
        name = path.relative_to(folder).parts[0]
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # of a part that was stopped as it wrote
            continue
        if not isinstance(stored, dict) or stored.get("machine", {}).get("kind") != "cuda":
            continue
        found.machine = stored["machine"]
        if name in ("divergence", "workspace"):
            into, report = getattr(found, name), load(path)
            into.machine = report.machine
            for rows in ("speed", "memory", "accuracy"):
                getattr(into, rows).extend(getattr(report, rows))
        elif name == "prefix":
            found.prefix += prefix.load(path).rows
        elif name == "step":
            found.step += step.load(path).rows
        elif name in ("tests", "memory"):
            getattr(found, name).append(stored)
    return found


def goals() -> list[Goal]:
    """In the order of the table."""
    shapes = [(f"H={shape.hidden}", shape) for shape in GOAL_SHAPES]
    return [
        Goal("the kernel tests pass, compiled", _tests),
        *(
            Goal(
                f"trained head, {at}: {SHARES[shape.hidden]:.0%} of four matmuls, at most 1.5 GB",
                partial(_share, shape, False, MOST_MEGABYTES),
            )
            for at, shape in shapes
        ),
        *(
            Goal(
                f"frozen head, {at}: {SHARES[shape.hidden]:.0%} of three matmuls, 256 MB",
                partial(_share, shape, True, FROZEN_MEGABYTES),
            )
            for at, shape in shapes
        ),
        Goal("speed against workspace, 128 MB to 2 GB, both heads, all H", _curve),
        Goal(f"KL: {TRL_KL}× TRL's chunked kernel", partial(_faster, TRL.name, FULL_VOCABULARY[:2], TRL_KL)),
        Goal(f"JSD: {TRL_JSD:g}× TRL's chunked kernel", partial(_faster, TRL.name, (JSD,), TRL_JSD)),
        Goal(f"{LIGER_ALL:g}× Liger's chunked loss", partial(_faster, LIGER.name, FULL_VOCABULARY[1:], LIGER_ALL)),
        Goal("never less accurate than TRL's kernel", _as_accurate),
        Goal(f"shared prefix: {PREFIX_SHARE:.0%} of its FLOPs bound", _prefix),
        Goal("one SDPO step, Qwen3-0.6B and 4B shapes, naive beside ours", _step),
        Goal("memory of a training step by category", _memory),
    ]


def goals_table(results: Results) -> str:
    """Markdown."""
    lines = ["| goal (N=8192, V=151,936, bf16) | measured | |", "| --- | --- | --- |"]
    for goal in goals():
        verdict = goal.judge(results)
        lines.append(f"| {goal.name} | {verdict.measured or '–'} | {verdict.status} |")
    return "\n".join(lines)


def rows_table(report: Report) -> str:
    """Markdown: of every row of the output layer its time, its bytes, what it is of the matmuls, and its error."""
    bytes_of = {(row.group, row.contender): row.live_bytes for row in report.memory}
    lines = [
        "| case | contender | ms | GiB | of the matmuls | error of gradients |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for group, rows in by_group(report.speed).items():
        floor = floor_seconds(rows)
        for row in rows:
            name = f"{row.contender} ({row.setting})" if row.setting else row.contender
            live = bytes_of.get((group, row.contender))
            cells = (
                [row.reason, "", "", ""]
                if row.reason
                else [
                    f"{row.median * 1e3:.2f}",
                    "–" if live is None else f"{live / GIB:.2f}",
                    f"{row.median / floor:.2f}×",
                    "–" if row.errors is None else format_error(row.errors.gradient),
                ]
            )
            lines.append(f"| {group} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def results_page(results: Results) -> str:
    """Everything as one Markdown file beside the run's folders."""
    parts = ["# A GPU run", describe(Report(machine=results.machine)) if results.machine else "No CUDA device."]
    parts.append(goals_table(results))
    if results.divergence.speed:
        parts.append(rows_table(results.divergence))
    if results.workspace.speed:
        parts += [curve_table(results.workspace).markdown(), rows_table(results.workspace)]
    for suite, rows in ((prefix, results.prefix), (step, results.step)):
        cases: dict[Any, list[Any]] = {}
        for row in rows:
            cases.setdefault(row.group, []).append(row)
        parts += [suite.case_table(case, of_case).markdown() for case, of_case in cases.items()]
    return "\n\n".join(parts) + "\n"


def _share(shape: Any, frozen: bool, most: int, results: Results) -> Verdict:
    """Speed as a share of the matrix products', of the divergences over the full vocabulary."""
    wanted, found, within = SHARES[shape.hidden], {}, True
    setting = ""
    for divergence in FULL_VOCABULARY:
        rows = _group(results.divergence, Group(shape, "bf16", divergence, frozen))
        ours = _timed(rows, SDCORE.name)
        if ours is None:
            continue
        found[divergence.name] = floor_seconds(rows) / ours.median
        setting = ours.setting
        within &= bool(setting) and float(setting.split()[1]) <= most
    text = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    return _judged(
        text + (f" ({setting})" if setting else ""),
        [within and share >= wanted for share in found.values()],
        len(FULL_VOCABULARY),
    )


def _faster(peer: str, divergences: Sequence[Divergence], times: float, results: Results) -> Verdict:
    found = {}
    for shape in GOAL_SHAPES:
        for divergence in divergences:
            rows = _group(results.divergence, Group(shape, "bf16", divergence))
            ours, theirs = _timed(rows, SDCORE.name), _timed(rows, peer)
            if ours is not None and theirs is not None:
                found[f"{divergence} H={shape.hidden}"] = theirs.median / ours.median
    text = ", ".join(f"{name} {gain:.2f}×" for name, gain in found.items())
    return _judged(text, [gain >= times for gain in found.values()], len(GOAL_SHAPES) * len(divergences))


def _as_accurate(results: Results) -> Verdict:
    """By the two digits that the tables show, of loss and gradients, in every group and in the table of errors."""
    worse, compared = [], 0
    cases: dict[Any, dict[str, Any]] = {}
    for speed in results.divergence.speed:
        cases.setdefault(str(speed.group), {})[speed.contender] = speed.errors
    for row in results.divergence.accuracy:
        cases.setdefault(f"{row.shape} {row.divergence} noise {row.noise:g}", {})[row.contender] = row.errors
    for name, errors in cases.items():
        ours, theirs = errors.get(SDCORE.name), errors.get(TRL.name)
        if ours is None or theirs is None:
            continue
        compared += 1
        if any(
            not float(f"{a:.1e}") <= float(f"{b:.1e}")
            for a, b in ((ours.loss, theirs.loss), (ours.gradient, theirs.gradient))
        ):
            worse.append(name)
    if not compared:
        return Verdict(NOT_MEASURED)
    text = f"{compared - len(worse)} of {compared} cases" + (f"; not in {'; '.join(worse)}" if worse else "")
    return Verdict(MISSED if worse else MET, text)


def _curve(results: Results) -> Verdict:
    found = curves(results.workspace)
    wanted = [Head(shape, frozen) for shape in GOAL_SHAPES for frozen in (False, True)]
    points = sum(size in found.get(head, {}) for head in wanted for size in MEGABYTES)
    if not points:
        return Verdict(NOT_MEASURED)
    texts = [
        f"H={head.shape.hidden}, {'frozen' if head.frozen else 'trained'}: {recommended(found[head])} MB is enough"
        for head in wanted
        if recommended(found.get(head, {})) is not None
    ]
    complete = points == len(wanted) * len(MEGABYTES)
    return Verdict(MEASURED if complete else IN_PART, "; ".join(texts))


def _prefix(results: Results) -> Verdict:
    """Per case the best of ours, as a share of the speed-up that the FLOPs allow it."""
    best: dict[Any, float] = {}
    for case in dict.fromkeys(row.group for row in results.prefix):
        rows = [row for row in results.prefix if row.group == case]
        ours = [row for row in rows if row.seconds and row.contender.startswith(("cached", "packed", "two_phase"))]
        if ours and prefix.reference(rows) is not None:
            best[case] = max(prefix.speedup(row, rows) / row.allowed for row in ours)
    if not best:
        return Verdict(NOT_MEASURED)
    worst = min(best, key=lambda case: best[case])
    text = f"{min(best.values()):.0%} to {max(best.values()):.0%} in {len(best)} cases; least: {worst.work}, {worst}"
    return _judged(text, [share >= PREFIX_SHARE for share in best.values()], len(PREFIX_CASES) * len(WORKS))


def _step(results: Results) -> Verdict:
    texts = []
    for case in dict.fromkeys(row.group for row in results.step):
        rows = [row for row in results.step if row.group == case]
        naive = _timed(rows, NAIVE.name)
        ours = [row for row in rows if row.ours and row.seconds]
        if naive is None or not ours:
            continue
        best = min(ours, key=lambda row: row.median)
        share = math.nan if not naive.live_bytes else (best.live_bytes or math.nan) / naive.live_bytes
        texts.append(f"{case.model}: {naive.median / best.median:.2f}× as fast, {share:.2f} of the bytes")
    if not texts:
        return Verdict(NOT_MEASURED)
    return Verdict(MEASURED if len(texts) > 1 else IN_PART, "; ".join(texts))


def _memory(results: Results) -> Verdict:
    texts = []
    for one in results.memory:
        peaks = {name: found["peak_bytes"] for name, found in one["contenders"].items() if "peak_bytes" in found}
        texts.append(f"{one['model']}: " + ", ".join(f"{name} {peak / GIB:.1f} GiB" for name, peak in peaks.items()))
    return Verdict(NOT_MEASURED) if not texts else Verdict(MEASURED if len(texts) > 1 else IN_PART, "; ".join(texts))


def _tests(results: Results) -> Verdict:
    if not results.tests:
        return Verdict(NOT_MEASURED)
    failed = [name for one in results.tests for name in one["failed"]]
    passed = sum(one["passed"] for one in results.tests)
    text = f"{passed} passed" + (f", {len(failed)} failed: {', '.join(failed[:5])}" if failed else "")
    return Verdict(MISSED if failed or not passed else MET, text)


def _judged(text: str, met: Sequence[bool], complete: int) -> Verdict:
    if not met:
        return Verdict(NOT_MEASURED)
    if not all(met):
        return Verdict(MISSED, text)
    return Verdict(MET if len(met) == complete else IN_PART, text)


def _group(report: Report, group: Group) -> list[SpeedRow]:
    return [row for row in report.speed if row.group == group]


def _timed(rows: Iterable[Any], contender: str) -> Any:
    return next((row for row in rows if row.contender == contender and row.seconds and not row.reason), None)


def newest_committed(results: Path) -> Path | None:
    """The folder of a GPU run among committed results, of the newest date; None where there is none."""
    dated = [(read(folder).machine.get("date", ""), folder) for folder in sorted(results.glob("*/gpu"))]
    return max(dated)[1] if dated else None


def _docs_block(results: Path, root: Path) -> str:
    folder = newest_committed(results)
    found = read(folder)
    if folder is None:
        return goals_table(found)
    about, place = describe(Report(machine=found.machine)), folder.relative_to(root).as_posix()
    return f"Measured on {about}, [all of it](../{place}).\n\n{goals_table(found)}"


DOCS: Final = Block("goals", _docs_block)


def renew_docs() -> Path:
    """Write the table of docs/gpu.md anew. Raises `ArgumentError` outside of a checkout."""
    root = checkout()
    if root is None:
        raise ArgumentError("docs/gpu.md is part of a checkout of sdcore, and this sdcore is an installed package")
    file = root / "docs" / "gpu.md"
    text = DOCS.renewed(file.read_text(encoding="utf-8"), root / "benchmarks" / "results", root)
    file.write_text(text, encoding="utf-8")
    return file


__all__ = [
    "DOCS",
    "Goal",
    "Results",
    "Verdict",
    "goals",
    "goals_table",
    "newest_committed",
    "read",
    "renew_docs",
    "results_page",
    "rows_table",
]
