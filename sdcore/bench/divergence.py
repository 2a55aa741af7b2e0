"""The suite `divergence`: the output layer and its loss, forward and backward, ours and the peers' beside the limit.

    run(Options(suite="divergence"))                     # this machine; ten minutes on two cores
    run(Options(suite="divergence", model="qwen3-4b", shapes=("N=512",), dtype="bf16"))

Speed and memory of every group of contenders, then accuracy; saved after every group, so that an interruption does not
lose those before it. The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from ..errors import ArgumentError
from .estimate import group_bytes
from .live_memory import MemoryRow, free_bytes, too_large
from .measure import attempt, measure_accuracy, measure_group, measure_memory
from .models import size_of
from .options import Options, workload
from .oracle import solve
from .peers import (
    CONTENDERS,
    LIGER,
    ORDA,
    PLAIN,
    PLAIN_LOW_PRECISION,
    SDCORE,
    SDCORE_RECOMPUTE,
    TRL,
    Contender,
    skipped,
    wanted,
)
from .report import Report, load, save
from .running import Run, publish, start
from .shapes import (
    ACCURACY_NOISES,
    ACCURACY_SHAPE,
    BOTH,
    CPU_SHAPES,
    FORWARD_KL,
    FULL_VOCABULARY,
    QUICK_ACCURACY_SHAPE,
    QUICK_SHAPE,
    REVERSE_KL,
    SPEED_NOISE,
    TOP_K,
    TOP_K_FORWARD,
    TOP_K_REVERSE,
    Group,
    Shape,
    chosen_groups,
    groups,
    make_case_inputs,
)
from .tables import markdown, report_tables
from .timing import SpeedRow

ACCURACY_CONTENDERS = (SDCORE, SDCORE_RECOMPUTE, TRL, LIGER, PLAIN, PLAIN_LOW_PRECISION)
ACCURACY_DIVERGENCES = (*FULL_VOCABULARY, TOP_K_FORWARD, TOP_K_REVERSE, TOP_K)
# Where the plain code would need 15 GiB: only what is built for it runs, once, for its bytes.
MEMORY_SHAPE = Shape(4096, 151936, 896)
SECONDS = 3.0
NOTHING_COMPILED = "nothing is compiled in a quick run"


def run(
    options: Options,
    *,
    planned: Sequence[Group] | None = None,
    contenders: Sequence[Contender] = CONTENDERS,
    resume: bool = False,
    progress: Console | None = None,
) -> Path:
    """Measure, save, show; returns the path of the JSON. Raises `ArgumentError`.

    `planned` measures these groups and nothing else. With `resume` the newest file of the options' output folder goes
    on, with the groups that it has not; its machine must be this one.
    """
    this = start(options, seconds=SECONDS, progress=progress)
    report = Report(machine=this.machine)
    kept = sorted(this.path.parent.glob(f"{options.suite}-*.json")) if resume else []
    if kept:
        this.path, report = kept[-1], load(kept[-1])
        if report.machine["name"] != this.machine["name"]:
            raise ArgumentError(
                f"output must hold results of this machine, {this.machine['name']}, to go on with; "
                f"{this.path} is of {report.machine['name']}"
            )
    done = {row.group for row in report.speed}
    wanted_groups = planned_groups(options, this.device) if planned is None else planned
    measure(this, report, [group for group in wanted_groups if group not in done], contenders)
    if planned is None and not options.chosen:
        measure_beyond_speed(this, report)
    save(report, this.path)
    report = load(this.path)  # every table shows the numbers that are on disk
    publish(
        this,
        markdown=markdown(report),
        save_plots=lambda: _plots(report, this.path),
        tables=reversed(report_tables(report)),  # what matters most ends next to the prompt
    )
    return this.path


def planned_groups(options: Options, device: str) -> list[Group]:
    """The suite's own groups, or those of a model and of shapes; in the order in which they are measured."""
    if not options.chosen:
        found = groups(device, quick=options.quick, everything=options.everything)
    else:
        found = []
        for sizes in options.sizes:
            rows = sizes.get("N", workload({}, device).rows)
            if options.model is not None:
                size = size_of(options.model)
                shape = Shape(rows, sizes.get("V", size.step_vocab), sizes.get("H", size.hidden))
            else:
                shape = Shape(rows, sizes.get("V", 32000), sizes.get("H", 1024))
            found += chosen_groups(shape, everything=options.everything)
    return [group for group in found if options.dtype in (None, group.dtype)]


def measure(this: Run, report: Report, planned: Sequence[Group], contenders: Sequence[Contender]) -> None:
    """Add speed and memory of all groups to the report."""
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
                report.speed += [SpeedRow(group=group, contender=one.name, reason=reason) for one in contenders]
                report.memory += [MemoryRow(group=group, contender=one.name, reason=reason) for one in contenders]
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
            save(report, this.path)
            gc.collect()


def measure_beyond_speed(this: Run, report: Report) -> None:
    """Add accuracy, and the bytes of a shape at which nothing else is affordable, to the report."""
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
    """Run what is not compiled once, so that no library counts as the memory of the first contender that needs it."""
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


def _plots(report: Report, path: Path) -> list[Path]:
    from .plot import save_plots

    return save_plots(report, path)


__all__ = ["measure", "measure_beyond_speed", "planned_groups", "run"]
