"""What the suites of whole passes have in common (`prefix`, `step`, `trainer`).

A contender's step is checked against the first one's in the run whose memory is counted, and only then timed; the rows
of a case take turns, and with them the limits: matrix products alone. A run is one JSON, a row per line, saved after
every case; its tables and plot are made of what is on disk.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .live_memory import MemoryRow, watch_memory
from .oracle import relative_error
from .peers import Unavailable
from .report import Report, rounded
from .running import Run
from .timing import SpeedRow, error_line, take_turns


class Outcome(NamedTuple):
    """What all contenders of a case must agree on."""

    values: Tensor  # (N, H) hidden states; () the loss in a step
    gradients: dict[str, Tensor]  # by parameter; empty for a teacher


Step = Callable[[], Outcome]


@dataclass(kw_only=True)
class PassRow(SpeedRow):
    """A contender in a case; `errors` stays empty, the errors of a pass are fields of their own."""

    group: Any  # the suite's case
    gradient_error: float = math.nan
    live_bytes: int | None = None  # the peak of one pass beyond weights and inputs, gradients included
    resident_bytes: int | None = None
    gradient_bytes: int = 0


Row = TypeVar("Row", bound=PassRow)


@dataclass(kw_only=True)
class PassReport(Generic[Row]):
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def general(self) -> Report:
        """What names a machine, in the other suite's words."""
        return Report(machine=self.machine)

    def by_case(self) -> dict[Any, list[Row]]:
        found: dict[Any, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """By parameter, of those that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_and_time(
    candidates: Iterable[tuple[Row, Callable[[], Step]]],
    judge: Callable[[Row, Outcome, Outcome], str | None],
    device: torch.device,
    *,
    seconds_per_row: float,
    limits: Iterable[tuple[Row, Callable[[], object]]] = (),
    exact: Outcome | None = None,
) -> None:
    """Fill in the rows of a case; repetitions come to `seconds_per_row`, or the least number.

    A candidate, with what builds its step, is taken up when those before it have been checked; one that has a `reason`
    already is passed over. `judge(row, outcome, first outcome)` notes errors in the row and says why it is not to be
    timed. `limits` are timed with the others, and not checked. With `exact`, the right answer from elsewhere, the first
    outcome is judged by it as well.
    """
    steps: list[tuple[Any, Any]] = []
    for row, build in candidates:
        if row.reason is not None:
            continue
        usage = MemoryRow(group=row.group, contender=row.contender)
        try:
            step = build()
            with watch_memory(usage, device, compiled=False):
                outcome = step()
        except Unavailable as unavailable:
            row.reason = str(unavailable)
            continue
        except Exception as error:
            row.reason = error_line(error)
            continue
        row.live_bytes, row.resident_bytes = usage.live_bytes, usage.resident_bytes
        row.gradient_bytes = sum(gradient.nbytes for gradient in outcome.gradients.values())
        if exact is None:
            exact = outcome
        else:
            row.reason = judge(row, outcome, exact)
        del outcome
        if row.reason is None:
            steps.append((row, step))
    exact = None
    if steps:
        for row, products in limits:
            products()
            steps.append((row, products))
        take_turns(steps, device, seconds_per_row)


def compare(outcome: Outcome, exact: Outcome) -> tuple[float, float]:
    """Relative errors of the states (or the loss), and of all gradients together; NaN for a pass without any."""
    values = relative_error(outcome.values, exact.values)
    if not exact.gradients:
        return values, math.nan
    if outcome.gradients.keys() != exact.gradients.keys():
        return values, math.inf
    norms = [
        (
            torch.linalg.vector_norm(outcome.gradients[name] - gradient, dtype=torch.float64).item(),
            torch.linalg.vector_norm(gradient, dtype=torch.float64).item(),
        )
        for name, gradient in exact.gradients.items()
    ]
    error = math.hypot(*(wrong for wrong, _ in norms)) / math.hypot(*(size for _, size in norms))
    return values, math.inf if math.isnan(error) else error


def milliseconds(row: PassRow) -> str:
    return f"{row.median * 1e3:.0f} ms" if row.median >= 0.1 else f"{row.median * 1e3:.1f} ms"


def memory_share(row: PassRow, base: PassRow | None) -> float:
    """Of the base's peak; NaN where one of them is not known."""
    if base is None or not base.live_bytes or row.live_bytes is None:
        return math.nan
    return row.live_bytes / base.live_bytes


def save(report: PassReport[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(rounded(asdict(row))) for row in report.rows)
    path.write_text(f'{{\n"machine": {json.dumps(report.machine)},\n"rows": [\n{lines}\n]\n}}\n')


def load(path: Path, row_type: type[Row], case_type: type[Any]) -> PassReport[Row]:
    stored = json.loads(path.read_text())
    unknown = [one.name for one in fields(row_type) if one.default is math.nan]  # JSON has null for these
    report: PassReport[Row] = PassReport(machine=stored["machine"])
    for entry in stored["rows"]:
        entry |= {name: math.nan for name in unknown if entry.get(name) is None}
        report.rows.append(row_type(**entry | {"group": case_type(**entry["group"])}))
    return report


def run_cases(
    run: Run, planned: Sequence[Any], measure: Callable[[Any], list[Any]], *, title: Callable[[Any], str]
) -> None:
    """Measure case after case; saved after each, so that an interruption does not lose those before it."""
    report: PassReport[Any] = PassReport(machine=run.machine)
    for number, case in enumerate(planned, start=1):
        began = time.perf_counter()
        rows = measure(case)
        report.rows += rows
        timed = sum(not row.reason for row in rows)
        run.progress.print(
            f"[{number}/{len(planned)}] {title(case)}: {timed} of {len(rows)} rows timed, "
            f"{time.perf_counter() - began:.0f} s"
        )
        save(report, run.path)
        gc.collect()


__all__ = [
    "Outcome",
    "PassReport",
    "PassRow",
    "Step",
    "check_and_time",
    "compare",
    "gradients_of",
    "load",
    "memory_share",
    "milliseconds",
    "run_cases",
    "save",
]
