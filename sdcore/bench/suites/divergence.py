"""The suite `divergence` measures the output layer and its loss, ours and the peers' beside the limit.

    run(SUITE, Options(suite="divergence"))                     # this machine; ten minutes on two cores
    run(SUITE, Options(suite="divergence", model="qwen3-4b", shapes=("N=512",), dtype="bf16"))

Speed and memory of every group of contenders come first, then accuracy; a run is saved after every group, so that an
interruption does not lose those before it. The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..contender import Contender, attempt, skipped
from ..estimate import group_bytes
from ..measure import free_bytes, too_large
from ..models import size_of
from ..options import WORKLOADS, Options
from ..oracle import solve
from ..output_layer import measure_accuracy, measure_group, measure_memory
from ..peers import (
    CONTENDERS,
    LIGER,
    ORDA,
    PLAIN,
    PLAIN_LOW_PRECISION,
    SDCORE,
    SDCORE_RECOMPUTE,
    TRL,
    wanted,
)
from ..rows import AccuracyRow, Errors, MemoryRow, Report, SpeedRow, write
from ..shapes import (
    ACCURACY_NOISES,
    ACCURACY_SHAPE,
    BOTH,
    CPU_SHAPES,
    FORWARD_KL,
    FULL_VOCABULARY,
    MIB,
    QUICK_ACCURACY_SHAPE,
    QUICK_SHAPE,
    REVERSE_KL,
    SPEED_NOISE,
    TOP_K,
    TOP_K_FORWARD,
    TOP_K_REVERSE,
    Divergence,
    Group,
    Shape,
    chosen_groups,
    groups,
    make_case_inputs,
)
from ..suite import Run, Suite
from ..tables import (
    Table,
    accuracy_table,
    by_group,
    floor_seconds,
    memory_selection,
    memory_table,
    ratio_table,
    speed_table,
)

ACCURACY_CONTENDERS = (SDCORE, SDCORE_RECOMPUTE, TRL, LIGER, PLAIN, PLAIN_LOW_PRECISION)
ACCURACY_DIVERGENCES = (*FULL_VOCABULARY, TOP_K_FORWARD, TOP_K_REVERSE, TOP_K)
# Where the plain code would need 15 GiB: only what is built for it runs, once, for its bytes.
MEMORY_SHAPE = Shape(4096, 151936, 896)
NOTHING_COMPILED = "nothing is compiled in a quick run"
COLOURED = (*CONTENDERS, PLAIN_LOW_PRECISION)
COLOURS = {contender.name: contender.colour for contender in COLOURED}


def planned_groups(options: Options, device: str) -> list[Group]:
    """Returns the suite's own groups, or those of a model and of shapes; in the order in which they are measured."""
    if not options.chosen:
        planned = groups(device, quick=options.quick, everything=options.everything)
    else:
        planned = []
        for sizes in options.sizes:
            rows = sizes.get("N", WORKLOADS[device]["completion"] * WORKLOADS[device]["completions"])
            if options.model is not None:
                size = size_of(options.model)
                shape = Shape(rows, sizes.get("V", size.step_vocab), sizes.get("H", size.hidden))
            else:
                shape = Shape(rows, sizes.get("V", 32000), sizes.get("H", 1024))
            planned += chosen_groups(shape, everything=options.everything)
    return [group for group in planned if options.dtype in (None, group.dtype)]


def measure(this: Run, report: Report, planned: Sequence[Group], contenders: Sequence[Contender]) -> None:
    """Adds speed and memory of all groups to the report."""
    options, device = this.options, this.device
    contenders = [contender for contender in contenders if wanted(contender, options.peers)]
    _load_libraries(contenders, device)
    done = 0
    for (shape, frozen), of_shape in groupby(planned, key=lambda group: (group.shape, group.frozen_head)):
        members = list(of_shape)
        divergences = tuple(dict.fromkeys(group.divergence for group in members))
        wide = [group for group in members if group.dtype == "fp32"] or members
        reason = too_large(group_bytes(wide[0], divergences), free_bytes(torch.device(device)))
        if reason is not None:
            for group in members:
                report.speed += [SpeedRow(group=group, contender=c.name, reason=reason) for c in contenders]
                report.memory += [MemoryRow(group=group, contender=c.name, reason=reason) for c in contenders]
            done += len(members)
            this.progress.print(f"{shape}: {reason}")
            continue
        this.progress.print(f"{shape}: the exact answers")
        wide_inputs = make_case_inputs(shape, "fp32", noise=SPEED_NOISE, device=device, frozen_head=frozen)
        exact = solve(wide_inputs, divergences)
        del wide_inputs
        for group in members:
            began = time.perf_counter()
            speed, memory = measure_group(
                group,
                [_for_this_run(contender, group, options, device) for contender in contenders],
                make_case_inputs(shape, group.dtype, noise=SPEED_NOISE, device=device, frozen_head=frozen),
                exact[group.divergence],
                seconds_per_row=this.seconds,
            )
            report.speed += speed
            report.memory += memory
            done += 1
            timed = sum(not row.reason for row in speed)
            this.progress.print(
                f"[{done}/{len(planned)}] {group}: {timed} of {len(speed)} rows timed, "
                f"{time.perf_counter() - began:.0f} s"
            )
            SUITE.save(report, this.path)
            gc.collect()


def measure_beyond_speed(this: Run, report: Report) -> None:
    """Adds accuracy, and the bytes of a shape at which nothing else is affordable, to the report."""
    options, device = this.options, this.device
    if not options.quick and options.dtype != "fp32":
        report.memory += measure_memory(Group(MEMORY_SHAPE, "bf16", REVERSE_KL), (SDCORE,), device)
        this.progress.print(f"{MEMORY_SHAPE}: memory")
    accuracy_shape = QUICK_ACCURACY_SHAPE if options.quick else ACCURACY_SHAPE
    report.accuracy = measure_accuracy(
        accuracy_shape,
        ACCURACY_NOISES,
        ACCURACY_DIVERGENCES,
        [
            skipped(contender, NOTHING_COMPILED) if options.quick and contender.compiled else contender
            for contender in ACCURACY_CONTENDERS
            if wanted(contender, options.peers)
        ],
        device=device,
    )
    this.progress.print("accuracy: done")


def _load_libraries(contenders: Sequence[Contender], device: str) -> None:
    """Runs what is not compiled once, so that no library counts as the memory of the first contender that needs it."""
    if device == "cuda":  # whose allocator counts tensors alone
        return
    for dtype in BOTH:
        inputs = make_case_inputs(QUICK_SHAPE, dtype, noise=SPEED_NOISE, device=device)
        for contender in contenders:
            step, _ = (None, "") if contender.compiled else attempt(contender, inputs, REVERSE_KL)
            if step is not None:
                with contextlib.suppress(Exception):  # its group reports it
                    step()


def _for_this_run(contender: Contender, group: Group, options: Options, device: str) -> Contender:
    if options.quick and contender.compiled:
        return skipped(contender, NOTHING_COMPILED)
    if device == "cuda" and contender is LIGER and group.divergence == FORWARD_KL:
        return skipped(contender, "compiled anew for every divergence; timed with the reverse KL and the JSD")
    if device == "cpu" and not (options.quick or options.everything or options.chosen):
        # Its torch path is the plain code once more, and takes the most time of all.
        if contender is ORDA and group.shape != CPU_SHAPES[0]:
            return skipped(contender, "plain torch code on a CPU; timed at the first shape only")
        if contender is SDCORE_RECOMPUTE and group.divergence not in (REVERSE_KL, TOP_K):
            return skipped(contender, "timed with the reverse KL and the top-k support only")
    return contender


@dataclass(frozen=True, kw_only=True)
class DivergenceSuite(Suite):
    """Measures `planned` and nothing else where it is given; else the suite's own groups, or what the options say."""

    planned: Sequence[Group] | None = None
    contenders: Sequence[Contender] = CONTENDERS

    def measure(self, run: Run) -> None:
        report = Report(machine=run.machine)
        planned = planned_groups(run.options, run.device) if self.planned is None else self.planned
        measure(run, report, planned, self.contenders)
        if self.planned is None and not run.options.chosen:
            measure_beyond_speed(run, report)
        self.save(report, run.path)

    def save(self, report: Report, path: Path) -> None:
        tables = {
            name: [_flat(asdict(row)) for row in getattr(report, name)] for name in ("speed", "memory", "accuracy")
        }
        write(path, report.machine, tables)

    def load(self, path: Path) -> Report:
        stored = json.loads(path.read_text())
        report = Report(machine=stored["machine"])
        for entry in stored["speed"]:
            report.speed.append(SpeedRow(group=_take_group(entry), **_with_errors(entry)))
        for entry in stored["memory"]:
            report.memory.append(MemoryRow(group=_take_group(entry), **entry))
        for entry in stored["accuracy"]:
            shape, divergence = Shape(*entry.pop("shape")), Divergence(**entry.pop("divergence"))
            entry["loss"] = math.nan if entry["loss"] is None else entry["loss"]
            report.accuracy.append(AccuracyRow(shape=shape, divergence=divergence, **_with_errors(entry)))
        return report

    def overviews(self, report: Report) -> list[Table]:
        return self._overviews(report, report.accuracy)

    def readme_tables(self, report: Report) -> list[Table]:
        return self._overviews(report, [row for row in report.accuracy if row.divergence in FULL_VOCABULARY])

    def _overviews(self, report: Report, accuracy: Sequence[AccuracyRow]) -> list[Table]:
        tables = [ratio_table(shape, report.speed) for shape in dict.fromkeys(row.group.shape for row in report.speed)]
        if report.memory:
            tables.append(memory_table(memory_selection(report.memory)))
        return tables + ([accuracy_table(accuracy)] if accuracy else [])

    def details(self, report: Report) -> list[Table]:
        return [speed_table(rows) for rows in by_group(report.speed).values()]

    def save_plots(self, report: Report, path: Path) -> list[Path]:
        """Draws times over the floor, bytes and errors, those for which something was measured."""
        drawn = {"speed": _draw_speed, "memory": _draw_memory, "accuracy": _draw_accuracy}
        measured = {name: draw for name, draw in drawn.items() if any(not row.reason for row in getattr(report, name))}
        return [draw(report, path.with_name(f"{path.stem}-{name}.png")) for name, draw in measured.items()]


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    # `asdict` turns the NamedTuple of a group into a list.
    if "group" in entry:
        shape, dtype, divergence, frozen = entry.pop("group")
        head = {"frozen_head": True} if frozen else {}
        entry = {"shape": shape, "dtype": dtype, "divergence": divergence} | head | entry
    return entry


def _take_group(entry: dict[str, Any]) -> Group:
    divergence, frozen = Divergence(**entry.pop("divergence")), entry.pop("frozen_head", False)
    return Group(Shape(*entry.pop("shape")), entry.pop("dtype"), divergence, frozen)


def _with_errors(entry: dict[str, Any]) -> dict[str, Any]:
    errors = entry.pop("errors")
    if errors is not None:
        errors = Errors(*(math.nan if error is None else error for error in errors))
    return entry | {"errors": errors}


def _draw_speed(report: Report, path: Path) -> Path:
    from ..plot import Bar, BarPanel, bars

    groups = by_group(report.speed)
    shapes, dtypes = ({getattr(group, name): None for group in groups} for name in ("shape", "dtype"))

    def panel(shape: Shape, dtype: str) -> BarPanel:
        labelled = []
        for group, rows in groups.items():
            if (group.shape, group.dtype) == (shape, dtype):
                floor, label = floor_seconds(rows), group.work.replace(", ", ",\n")
                timed = sorted((row for row in rows if row.contender in COLOURS and not row.reason), key=_median)
                ours = [f"\n{row.median / floor:.2f}×" for row in timed if row.contender == SDCORE.name]
                shown = [Bar(row.median / floor, COLOURS[row.contender], row.contender) for row in timed]
                labelled.append(("".join([label, *ours]), shown))
        ylabel = "time / four bare matmuls" if shape == next(iter(shapes)) else ""
        return BarPanel(labelled, f"{shape}, {dtype}", ylabel, line=1.0, least_groups=2)

    title = f"linear_divergence, forward + backward, {report.machine['name']} (under the names: sdcore)"
    size = max(8.0, 1.5 + 3.5 * len(shapes)), 1.2 + 3.1 * len(dtypes)
    return bars([[panel(shape, dtype) for shape in shapes] for dtype in dtypes], path, title=title, size=size)


def _median(row: SpeedRow) -> float:
    return row.median


def _draw_memory(report: Report, path: Path) -> Path:
    from ..plot import Bar, BarPanel, bars

    def peak(row: MemoryRow) -> float:
        return ((row.live_bytes if row.live_bytes is not None else row.resident_bytes) or 0) / MIB

    selected = memory_selection(report.memory)
    dtype = selected[-1].group.dtype
    labelled = []
    for group, rows in by_group(row for row in selected if row.group.dtype == dtype).items():
        shown = [
            # Ours with a workspace of its own has no colour of its own.
            Bar(peak(row), COLOURS.get(row.contender, SDCORE.colour), row.contender, row.gradient_bytes / MIB)
            for row in sorted(filter(peak, rows), key=peak)
        ]
        for bar in shown:
            bar.text = f" {bar.height:.0f}"
        labelled.append((f"{group.shape}\n{group.work}", shown))
    title = f"Peak memory of one step, {dtype} (pale: the gradients)"
    panel = BarPanel(labelled, ylabel="peak MiB beyond the inputs")
    return bars([[panel]], path, title=title, size=(max(8.0, 2.0 + 2.1 * len(labelled)), 4.4))


def _draw_accuracy(report: Report, path: Path) -> Path:
    from ..plot import LINE, Line, LinePanel, lines

    def panel(divergence: Divergence, of_loss: bool) -> LinePanel:
        rows = [row for row in report.accuracy if row.divergence == divergence and row.errors is not None]
        drawn = []
        for contender in (one for one in COLOURED if any(row.contender == one.name for row in rows)):
            # An exact zero has no place on a logarithmic axis.
            points = [
                (row.noise, max(row.errors.loss if of_loss else row.errors.gradient, 1e-9))
                for row in rows
                if row.contender == contender.name and row.errors
            ]
            ours = contender is SDCORE
            style = {"color": contender.colour, "marker": contender.marker, "markersize": 5, "zorder": 4 if ours else 2}
            drawn.append(Line(points, style | {"linewidth": 2.2 if ours else 1.2}, contender.name))
        noises = {row.noise: f"{row.noise:g}" for row in sorted(rows, key=lambda row: row.noise)}
        what = "loss" if of_loss else "gradients"
        return LinePanel(
            drawn,
            noises,
            title=str(divergence).replace(", ", ",\n") if of_loss else "",
            xlabel="" if of_loss else "teacher − student (noise)",
            ylabel=f"relative error of the {what}" if divergence == divergences[0] else "",
            levels=[(1.0, LINE)],
        )

    divergences = list(dict.fromkeys(row.divergence for row in report.accuracy))
    grid = [[panel(divergence, of_loss) for divergence in divergences] for of_loss in (True, False)]
    title = f"Error against float64, {report.accuracy[0].shape}, bf16 inputs (dashed: 100 %)"
    return lines(grid, path, title=title, size=(1.5 + 2.4 * len(divergences), 6.4))


SUITE = DivergenceSuite(
    name="divergence", title="Benchmark of linear_divergence", seconds=3.0, picture="The output layer and its loss"
)
