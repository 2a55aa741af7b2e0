"""Runs a suite: resolves its options, has it measured, and shows what is on disk as tables and pictures.

    run(prefix.SUITE, Options(suite="prefix", quick=True))

A suite is a `PassSuite` or the `DivergenceSuite`. It has a name, the title of its page, the seconds of a row and a name
for its picture; it measures into the JSON of a run, loads and saves a report, and says of one on what it was measured
(`about`), what it comes to (`overviews`), all there is to know (`details`), and draws it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import ArgumentError
from .options import Options, result_path
from .rows import describe_machine, machine_folder
from .tables import describe

NO_PLOTS = 'no plots, matplotlib is not installed: pip install "sdcore[bench]"'


@dataclass(eq=False)
class Run:
    """Holds a suite's options, resolved on this machine."""

    options: Options
    seconds: float  # for a row; 0: each once
    device: str
    progress: Console
    machine: dict[str, Any]
    path: Path  # of the JSON
    started: float = field(default_factory=time.perf_counter)


def start(options: Options, *, seconds: float, progress: Console | None = None) -> Run:
    """Resolves what the options leave open; `seconds` is the suite's default. Raises `ArgumentError`."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device is cuda, but torch sees no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = describe_machine(device)
    named = {"suite": options.kind, "device": machine_folder(machine), "date": machine["date"]}
    path = result_path(**named, variant=options.variant, output=options.output)
    chosen = seconds if options.seconds is None else options.seconds
    return Run(
        options=options,
        seconds=0.0 if options.quick else chosen,
        device=device,
        progress=progress or Console(stderr=True, soft_wrap=True),
        machine=machine,
        path=path,
    )


def run(suite: Any, options: Options, *, progress: Console | None = None) -> Path:
    """Measures, saves, shows; returns the path of the JSON. Raises `ArgumentError`."""
    this = start(options, seconds=suite.seconds, progress=progress)
    suite.measure(this)
    report = suite.load(this.path)  # every table shows the numbers that are on disk
    page = this.path.with_suffix(".md")
    page.write_text(markdown(suite, report), encoding="utf-8")
    written = [this.path, page]
    try:
        written += suite.save_plots(report, this.path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        this.progress.print(NO_PLOTS)
    terminal = Console() if sys.stdout.isatty() else Console(width=160)  # files and pipes are not folded
    # What matters most ends next to the prompt.
    for table in [*suite.details(report), *reversed(suite.overviews(report))]:
        table.print(terminal)
    taken = time.perf_counter() - this.started
    this.progress.print(f"{taken:.0f} s; wrote {', '.join(map(str, written))}", soft_wrap=True)
    return this.path


def markdown(suite: Any, report: Any) -> str:
    """Writes the whole report as a file beside its JSON."""
    tables = [*suite.overviews(report), *suite.details(report)]
    head = [f"# {suite.title}", describe(report.machine), *suite.about(report)]
    return "\n\n".join([*head, *(table.markdown() for table in tables)]) + "\n"
