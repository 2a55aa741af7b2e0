"""The suite `divergence` measures the output layer and its loss, ours and the peers' beside the limit.

    run(SUITE, Options(suite="divergence"))                     # this machine; ten minutes on two cores
    run(SUITE, Options(suite="divergence", model="qwen3-4b", shapes=("N=512",), dtype="bf16"))

Speed and memory of every group of contenders come first, then accuracy. A contender is checked against the oracle, with
its memory watched in the same step, and only then timed, in turns with the others and the bare products. A run is saved
after every group, so that an interruption does not lose those before it. The times mean something on a machine that
does nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch

from sdkernels.live_bytes import free_bytes

from ... import charts
from ...charts import Bar, figure_of, save
from ...errors import ArgumentError
from .. import peers, shapes, tables
from ..measure import check_and_time, error_line, group_bytes, peak_bytes, too_large
from ..models import size_of
from ..options import DIVERGENCES, WORKLOADS, Options
from ..oracle import compare, difference, solve
from ..peers import CONTENDERS, PLAIN_LOW_PRECISION, SDCORE, SDCORE_RECOMPUTE, Contender, prepare, skipped
from ..rows import AccuracyRow, Errors, MemoryRow, Outcome, PassRow, Report, SpeedRow, Step, by_group, write
from ..shapes import MIB, QUICK_SHAPE, REVERSE_KL, SPEED_NOISE, CaseInputs, Divergence, Group, Shape, make_case_inputs
from ..states import States, load
from ..suite import Run
from ..tables import Table, floor_seconds, memory_selection

ACCURACY_CONTENDERS = (SDCORE, SDCORE_RECOMPUTE, peers.TRL, peers.LIGER, peers.PLAIN, PLAIN_LOW_PRECISION)
ACCURACY_DIVERGENCES = (*shapes.FULL_VOCABULARY, shapes.TOP_K_FORWARD, shapes.TOP_K_REVERSE, shapes.TOP_K)
# Where the plain code would need 15 GiB: only what is built for it runs, once, for its bytes.
MEMORY_SHAPE = Shape(4096, 151936, 896)
NOTHING_COMPILED = "nothing is compiled in a quick run"
Kind = TypeVar("Kind", SpeedRow, MemoryRow)
BELOW: Any = {"legend": "below", "legend_columns": 5}
COLOURED = (*CONTENDERS, PLAIN_LOW_PRECISION)
COLOURS = {contender.name: contender.colour for contender in COLOURED}


def planned_groups(options: Options, device: str, states: States | None = None) -> list[Group]:
    """Returns the suite's own groups, or those of a model, of shapes, of states; in the order of measuring."""
    wanted = [dict(zip(DIVERGENCES, shapes.ALL, strict=True))[name] for name in options.divergences or DIVERGENCES]
    if not options.chosen and states is None:
        planned = shapes.groups(device, quick=options.quick, everything=options.everything)
    else:
        planned, size = [], size_of(options.model) if options.model else None
        everything = options.everything or options.divergences is not None
        for sizes in options.sizes:
            rows = sizes.get("N", WORKLOADS[device]["completion"] * WORKLOADS[device]["completions"])
            vocab, hidden = (size.step_vocab, size.hidden) if size else (32000, 1024)
            shape = Shape(rows, sizes.get("V", vocab), sizes.get("H", hidden))
            shape, name = (states.shape_of(sizes.get("N")), states.name) if states else (shape, "")
            planned += shapes.chosen_groups(shape, everything=everything, states=name)
    planned = [group for group in planned if options.dtype in (None, group.dtype) and group.divergence in wanted]
    if not planned:
        raise ArgumentError(f"divergences must be among the suite's own, or beside a shape, got {options.divergences}")
    return planned


def measure_beyond_speed(this: Run, report: Report) -> None:
    """Adds accuracy, and the bytes of a shape at which nothing else is affordable, to the report."""
    options, device = this.options, this.device
    if not options.quick and options.dtype != "fp32":
        report.memory.append(measure_memory(Group(MEMORY_SHAPE, "bf16", REVERSE_KL), SDCORE, device))
        this.progress.print(f"{MEMORY_SHAPE}: memory")
    shape = shapes.QUICK_ACCURACY_SHAPE if options.quick else shapes.ACCURACY_SHAPE
    contenders = [
        skipped(contender, NOTHING_COMPILED) if options.quick and contender.compiled else contender
        for contender in ACCURACY_CONTENDERS
        if peers.wanted(contender, options.peers)
    ]
    for noise in shapes.ACCURACY_NOISES:
        report.accuracy += measure_accuracy(shape, noise, ACCURACY_DIVERGENCES, contenders, device)
    this.progress.print("accuracy: done")


def measure_group(
    group: Group, contenders: Sequence[Contender], inputs: CaseInputs, exact: Outcome, *, seconds_per_row: float | None
) -> tuple[list[SpeedRow], list[MemoryRow]]:
    """Checks, then times all contenders of a group; repetitions come to `seconds_per_row`, or to the least number."""
    device = inputs.device
    # A CPU may be slower in bfloat16 than in float32; a GPU is not.
    dtypes = dict.fromkeys((group.dtype,) if device.type == "cuda" else ("fp32", group.dtype))
    floors = [
        (SpeedRow(group=group, contender=f"{peers.floor_name(inputs)} {dtype}"), peers.bare_matmuls(inputs, dtype))
        for dtype in dtypes
    ]
    rows: list[PassRow] = []

    def candidates() -> Iterator[tuple[PassRow, Callable[[], Step]]]:
        for contender in contenders:
            needed = peak_bytes(contender.name, group, device.type)
            row = PassRow(group=group, contender=contender.name, reason=too_large(needed, free_bytes(device)))
            rows.append(row)
            yield row, partial(built, contender, inputs, group.divergence)
            row.setting = peers.setting(contender, inputs)

    compiled = [contender.name for contender in contenders if contender.compiled]
    check_and_time(
        candidates(), _judge, device, seconds_per_row=seconds_per_row, limits=floors, exact=exact, compiled=compiled
    )
    return [row for row, _ in floors] + [_as(SpeedRow, row) for row in rows], [_as(MemoryRow, row) for row in rows]


def _as(kind: type[Kind], row: PassRow) -> Kind:
    """Keeps of a row what another kind of row has."""
    return kind(**{field.name: getattr(row, field.name) for field in fields(kind)})


def built(contender: Contender, inputs: CaseInputs, divergence: Divergence) -> Step:
    """Makes a step that has run once if it is compiled or tuned."""
    step = prepare(contender, inputs, divergence)
    if contender.compiled:
        step()
    return step


def _judge(row: PassRow, outcome: Outcome, exact: Outcome) -> str | None:
    row.errors = compare(outcome, exact)
    kept = {contender.name: contender.tolerance for contender in peers.OURS}.get(row.contender, 0.0)
    return difference(row.errors, row.group.dtype, on_states=bool(row.group.states), tolerance=kept)


def measure_memory(group: Group, contender: Contender, device: str) -> MemoryRow:
    """Runs a step for its bytes alone: for a shape at which nothing else is affordable."""
    inputs = make_case_inputs(group.shape, group.dtype, noise=SPEED_NOISE, device=device)
    row = PassRow(group=group, contender=contender.name)
    build = partial(built, contender, inputs, group.divergence)
    check_and_time([(row, build)], lambda *outcomes: None, inputs.device, seconds_per_row=None)
    return _as(MemoryRow, row)


def measure_accuracy(
    shape: Shape, noise: float, divergences: tuple[Divergence, ...], contenders: Sequence[Contender], device: str
) -> list[AccuracyRow]:
    """Measures the errors of every contender with bfloat16 inputs, the teacher `noise` away from the student."""
    inputs = make_case_inputs(shape, "bf16", noise=noise, device=device)
    exact = solve(inputs, divergences)
    rows = []
    for divergence in divergences:
        for contender in contenders:
            row = AccuracyRow(shape=shape, dtype="bf16", divergence=divergence, noise=noise, contender=contender.name)
            rows.append(row)
            try:
                result = built(contender, inputs, divergence)()
            except Exception as error:
                row.reason = error_line(error)
            else:
                row.errors, row.loss = compare(result, exact[divergence]), result.values.item()
    return rows


def _load_libraries(contenders: Sequence[Contender], device: str) -> None:
    """Runs what is not compiled once, so that no library counts as the memory of the first contender that needs it."""
    if device == "cuda":  # whose allocator counts tensors alone
        return
    for dtype in shapes.BOTH:
        inputs = make_case_inputs(QUICK_SHAPE, dtype, noise=SPEED_NOISE, device=device)
        for contender in contenders:
            if not contender.compiled:
                with contextlib.suppress(Exception):  # its group reports it
                    built(contender, inputs, REVERSE_KL)()


def _for_this_run(contender: Contender, group: Group, options: Options, device: str) -> Contender:
    if options.quick and contender.compiled:
        return skipped(contender, NOTHING_COMPILED)
    if device == "cuda" and contender is peers.LIGER and group.divergence == shapes.FORWARD_KL:
        return skipped(contender, "compiled anew for every divergence; timed with the reverse KL and the JSD")
    if device == "cpu" and not (options.quick or options.everything or options.chosen):
        if contender is peers.ORDA and group.shape != shapes.CPU_SHAPES[0]:  # and takes the most time of all
            return skipped(contender, "plain torch code on a CPU; timed at the first shape only")
        wanted = contender.tolerance if group.states else group.divergence in (REVERSE_KL, shapes.TOP_K)
        if contender in peers.OURS[1:] and not wanted:
            return skipped(contender, "timed on random rows, with the reverse KL and the top-k support only")
    return contender


@dataclass(kw_only=True)
class DivergenceSuite:
    """Measures `planned` and nothing else where it is given; else the suite's own groups, or what the options say."""

    name: str = "divergence"
    title: str = "Benchmark of linear_divergence"
    seconds: float = 3.0
    picture: str = "The output layer and its loss"
    planned: Sequence[Group] | None = None
    contenders: Sequence[Contender] = CONTENDERS

    def measure(self, run: Run) -> None:
        options, device, report = run.options, run.device, Report(machine=run.machine)
        states = load(options.states, run.progress.print) if options.states else None
        make = states.inputs if states else partial(make_case_inputs, noise=SPEED_NOISE)
        planned = planned_groups(options, device, states) if self.planned is None else self.planned
        contenders = [contender for contender in self.contenders if peers.wanted(contender, options.peers)]
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
                run.progress.print(f"{shape}: {reason}")
                continue
            run.progress.print(f"{shape}: the exact answers")
            exact = solve(make(shape, "fp32", device=device, frozen_head=frozen), divergences, float64=bool(states))
            for group in members:
                began = time.perf_counter()
                speed, memory = measure_group(
                    group,
                    [_for_this_run(contender, group, options, device) for contender in contenders],
                    make(shape, group.dtype, device=device, frozen_head=frozen),
                    exact[group.divergence],
                    seconds_per_row=run.seconds,
                )
                report.speed += speed
                report.memory += memory
                done += 1
                timed = sum(not row.reason for row in speed)
                run.progress.print(
                    f"[{done}/{len(planned)}] {group}: {timed} of {len(speed)} rows timed, "
                    f"{time.perf_counter() - began:.0f} s"
                )
                self.save(report, run.path)
                gc.collect()
        if states is not None:
            report.mass = states.mass(max(group.shape.rows for group in planned))
        elif self.planned is None and not options.chosen:
            measure_beyond_speed(run, report)
        self.save(report, run.path)

    def save(self, report: Report, path: Path) -> None:
        tables = {
            name: [_flat(asdict(row)) for row in getattr(report, name)] for name in ("speed", "memory", "accuracy")
        }
        write(path, report.machine, tables | ({"mass": report.mass} if report.mass else {}))

    def load(self, path: Path) -> Report:
        stored = json.loads(path.read_text())
        report = Report(machine=stored["machine"], mass=stored.get("mass", []))
        for entry in stored["speed"]:
            report.speed.append(SpeedRow(group=_take_group(entry), **_with_errors(entry)))
        for entry in stored["memory"]:
            report.memory.append(MemoryRow(group=_take_group(entry), **entry))
        for entry in stored["accuracy"]:
            shape, divergence = Shape(*entry.pop("shape")), Divergence(**entry.pop("divergence"))
            entry["loss"] = math.nan if entry["loss"] is None else entry["loss"]
            report.accuracy.append(AccuracyRow(shape=shape, divergence=divergence, **_with_errors(entry)))
        return report

    def about(self, report: Report) -> list[str]:
        return []

    def overviews(self, report: Report) -> list[Table]:
        measured = list(dict.fromkeys(row.group.shape for row in report.speed))
        shown = [tables.ratio_table(shape, report.speed) for shape in measured]
        if any(row.group.states for row in report.speed):
            shown += [tables.error_table(shape, report.speed) for shape in measured]
        if report.mass:
            shown.append(tables.mass_table(report.mass))
        if report.memory:
            shown.append(tables.memory_table(memory_selection(report.memory)))
        return shown + ([tables.accuracy_table(report.accuracy)] if report.accuracy else [])

    def details(self, report: Report) -> list[Table]:
        return [tables.speed_table(rows) for rows in by_group(report.speed).values()]

    def save_plots(self, report: Report, path: Path) -> list[Path]:
        """Draws times over the floor, bytes and errors, those for which something was measured."""
        drawn = {"speed": _draw_speed, "memory": _draw_memory, "accuracy": _draw_accuracy}
        measured = {name: draw for name, draw in drawn.items() if any(not row.reason for row in getattr(report, name))}
        return [draw(report, path.with_name(f"{path.stem}-{name}.png")) for name, draw in measured.items()]


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    # `asdict` turns the NamedTuple of a group into a list.
    if "group" in entry:
        shape, dtype, divergence, *rest = entry.pop("group")
        more = {name: value for name, value in zip(("frozen_head", "states"), rest, strict=True) if value}
        entry = {"shape": shape, "dtype": dtype, "divergence": divergence} | more | entry
    return entry


def _take_group(entry: dict[str, Any]) -> Group:
    divergence, shape = Divergence(**entry.pop("divergence")), Shape(*entry.pop("shape"))
    return Group(shape, entry.pop("dtype"), divergence, entry.pop("frozen_head", False), entry.pop("states", ""))


def _with_errors(entry: dict[str, Any]) -> dict[str, Any]:
    errors = entry.pop("errors")
    if errors is not None:
        errors = Errors(*(math.nan if error is None else error for error in errors))
    return entry | {"errors": errors}


def _draw_speed(report: Report, path: Path) -> Path:
    groups = by_group(report.speed)
    shapes, dtypes = (list(dict.fromkeys(getattr(group, name) for group in groups)) for name in ("shape", "dtype"))

    def panel(axes: Any, shape: Shape, dtype: str) -> None:
        shown = {}
        for group, rows in groups.items():
            if (group.shape, group.dtype) == (shape, dtype):
                floor, label = floor_seconds(rows), group.work.replace(", ", ",\n")
                timed = sorted(
                    (row for row in rows if row.contender in COLOURS and not row.reason), key=attrgetter("median")
                )
                ours = [f"\n{row.median / floor:.2f}×" for row in timed if row.contender == SDCORE.name]
                shown["".join([label, *ours])] = [
                    Bar(row.median / floor, COLOURS[row.contender], row.contender) for row in timed
                ]
        if not shown:  # this shape was not measured in this dtype
            axes.set_axis_off()
            return
        charts.bars(axes, shown)
        axes.axhline(1.0, **charts.DASHED)
        axes.set(title=f"{shape}, {dtype}", ylabel="time / four bare matmuls" if shape == shapes[0] else "")

    title = f"linear_divergence, forward + backward, {report.machine['name']} (under the names: sdcore)"
    panels = [partial(panel, shape=shape, dtype=dtype) for dtype in dtypes for shape in shapes]
    size = max(8.0 / len(shapes), 4.0), 3.3
    return save(figure_of(panels, columns=len(shapes), size=size, title=title, sharey="row", **BELOW), path)


def _draw_memory(report: Report, path: Path) -> Path:
    def peak(row: MemoryRow) -> float:
        return ((row.live_bytes if row.live_bytes is not None else row.resident_bytes) or 0) / MIB

    selected = memory_selection(report.memory)
    dtype = selected[-1].group.dtype
    groups = {
        # Ours with a workspace of its own has no colour of its own.
        f"{group.shape}\n{group.work}": [
            Bar(peak(row), COLOURS.get(row.contender, SDCORE.colour), row.contender, row.gradient_bytes / MIB)
            for row in sorted(filter(peak, rows), key=peak)
        ]
        for group, rows in by_group(row for row in selected if row.group.dtype == dtype).items()
    }

    def panel(axes: Any) -> None:
        charts.bars(axes, groups)
        axes.set_ylabel("peak MiB beyond the inputs")

    title = f"Peak memory of one step, {dtype} (pale: the gradients)"
    return save(figure_of([panel], size=(max(8.0, 2.0 + 2.1 * len(groups)), 4.4), title=title, **BELOW), path)


def _draw_accuracy(report: Report, path: Path) -> Path:
    def panel(axes: Any, divergence: Divergence, of_loss: bool) -> None:
        for contender in COLOURED:
            # An exact zero has no place on a logarithmic axis.
            points = {
                row.noise: max(row.errors.loss if of_loss else row.errors.gradient, 1e-9)
                for row in report.accuracy
                if (row.divergence, row.contender) == (divergence, contender.name) and row.errors
            }
            style: dict[str, Any] = {"linewidth": 2.2, "zorder": 4} if contender is SDCORE else {"linewidth": 1.2}
            style |= {"color": contender.colour, "marker": contender.marker, "markersize": 5}
            if points:
                charts.line(axes, list(points), list(points.values()), label=contender.name, **style)
        axes.axhline(1.0, **charts.DASHED)
        charts.log_scale(axes, y=10)
        charts.sizes_on_x(axes, sorted({row.noise for row in report.accuracy}))
        if of_loss:
            axes.set_title(str(divergence).replace(", ", ",\n"))
        else:
            axes.set_xlabel("teacher − student (noise)")
        if divergence == divergences[0]:
            axes.set_ylabel(f"relative error of the {'loss' if of_loss else 'gradients'}")

    divergences = list(dict.fromkeys(row.divergence for row in report.accuracy))
    panels = [partial(panel, divergence=d, of_loss=of_loss) for of_loss in (True, False) for d in divergences]
    title = f"Error against float64, {report.accuracy[0].shape}, bf16 inputs (dashed: 100 %)"
    shared: Any = {"sharex": True, "sharey": "row"}
    return save(figure_of(panels, columns=len(divergences), size=(2.6, 3.2), title=title, **shared, **BELOW), path)


SUITE = DivergenceSuite()
