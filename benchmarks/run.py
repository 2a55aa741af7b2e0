"""Measure every group, show how far it is, write the report.

    python -m benchmarks                     # this machine; a quarter of an hour on two cores
    python -m benchmarks --device cuda
    python -m benchmarks --quick --output /tmp/quick.json
    python -m benchmarks --readme            # only renew the results in the README

The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import readme
from benchmarks.command import parser, print_tables
from benchmarks.measure import attempt, measure_accuracy, measure_group, measure_memory
from benchmarks.oracle import solve
from benchmarks.peers import (
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
)
from benchmarks.report import RESULTS, Report, describe_machine, load, save
from benchmarks.shapes import (
    ACCURACY_NOISES,
    ACCURACY_SHAPE,
    BOTH,
    CPU_SHAPES,
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
    groups,
    make_case_inputs,
)
from benchmarks.tables import markdown, report_tables

ACCURACY_CONTENDERS = (SDCORE, SDCORE_RECOMPUTE, TRL, LIGER, PLAIN, PLAIN_LOW_PRECISION)
ACCURACY_DIVERGENCES = (*FULL_VOCABULARY, TOP_K_FORWARD, TOP_K_REVERSE, TOP_K)
# Where the plain code would need 15 GiB: only what is built for it runs, once, for its bytes.
MEMORY_SHAPE = Shape(4096, 151936, 896)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.readme:
        readme.update()
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    started = time.perf_counter()
    report = run(
        options.device, quick=options.quick, everything=options.everything, seconds=options.seconds, console=console
    )
    path = options.output or RESULTS / report.device / f"{report.machine['date']}.json"
    save(report, path)
    report = load(path)  # every table shows the numbers that are on disk
    path.with_suffix(".md").write_text(markdown(report))
    written = [path, path.with_suffix(".md"), *_plots(report, path)]
    print_tables(reversed(report_tables(report)))  # what matters most ends next to the prompt
    console.print(f"{time.perf_counter() - started:.0f} s; wrote {', '.join(map(str, written))}")


def _parser() -> argparse.ArgumentParser:
    made = parser(
        prog="python -m benchmarks",
        description=__doc__.partition("\n")[0],
        quick="one tiny shape, nothing compiled",
        seconds=3.0,
        output="benchmarks/results/<device>/<date>.json",
    )
    made.add_argument("--everything", action="store_true", help="every divergence and dtype at every shape")
    made.add_argument("--readme", action="store_true", help="only renew the results in README.md, measure nothing")
    return made


def run(device: str, *, quick: bool, everything: bool, seconds: float, console: Console) -> Report:
    """Speed and memory of all groups, then accuracy."""
    report = Report(machine=describe_machine(device))
    planned = groups(device, quick=quick, everything=everything)
    _load_libraries(device)
    done = 0
    for shape, of_shape in groupby(planned, key=lambda group: group.shape):
        members = list(of_shape)
        console.print(f"{shape}: the exact answers")
        exact = solve(
            make_case_inputs(shape, "fp32", noise=SPEED_NOISE, device=device),
            tuple(dict.fromkeys(group.divergence for group in members)),
        )
        for group in members:
            began = time.perf_counter()
            speed, memory = measure_group(
                group,
                [_for_this_run(contender, group, device, quick, everything) for contender in CONTENDERS],
                make_case_inputs(shape, group.dtype, noise=SPEED_NOISE, device=device),
                exact[group.divergence],
                seconds_per_row=0.0 if quick else seconds,
            )
            report.speed += speed
            report.memory += memory
            done += 1
            timed = sum(not row.reason for row in speed)
            console.print(
                f"[{done}/{len(planned)}] {group}: {timed} of {len(speed)} rows timed, "
                f"{time.perf_counter() - began:.0f} s"
            )
            gc.collect()
    if not quick:
        report.memory += measure_memory(Group(MEMORY_SHAPE, "bf16", REVERSE_KL), (SDCORE,), device)
        console.print(f"{MEMORY_SHAPE}: memory")
    accuracy_shape = QUICK_ACCURACY_SHAPE if quick else ACCURACY_SHAPE
    accuracy_group = Group(accuracy_shape, "bf16", REVERSE_KL)
    report.accuracy = measure_accuracy(
        accuracy_shape,
        ACCURACY_NOISES,
        ACCURACY_DIVERGENCES,
        [_for_this_run(contender, accuracy_group, device, quick, True) for contender in ACCURACY_CONTENDERS],
        device=device,
    )
    console.print("accuracy: done")
    return report


def _load_libraries(device: str) -> None:
    """Run what is not compiled once, so that no library counts as the memory of the first contender that needs it."""
    for dtype in BOTH:
        inputs = make_case_inputs(QUICK_SHAPE, dtype, noise=SPEED_NOISE, device=device)
        for contender in CONTENDERS:
            step, _ = (None, "") if contender.compiled else attempt(contender, inputs, REVERSE_KL)
            if step is not None:
                with contextlib.suppress(Exception):  # its group reports it
                    step()


def _for_this_run(contender: Contender, group: Group, device: str, quick: bool, everything: bool) -> Contender:
    if quick and contender.compiled:
        return skipped(contender, "nothing is compiled in a quick run")
    if device == "cpu" and not (quick or everything):
        # Its torch path is the plain code once more, and takes the most time of all.
        if contender is ORDA and group.shape != CPU_SHAPES[0]:
            return skipped(contender, "plain torch code on a CPU; timed at the first shape only")
        if contender is SDCORE_RECOMPUTE and group.divergence not in (REVERSE_KL, TOP_K):
            return skipped(contender, "timed with the reverse KL and the top-k support only")
    return contender


def _plots(report: Report, path: Path) -> list[Path]:
    from benchmarks.plot import save_plots

    return save_plots(report, path)


if __name__ == "__main__":
    main()
