"""What the suites have in common: where and how they run, and how their results come out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..errors import ArgumentError
from .options import Options
from .places import result_path
from .report import Report, describe_machine

if TYPE_CHECKING:
    from .tables import Table

NO_PLOTS = 'no plots, matplotlib is not installed: pip install "sdcore[bench]"'


@dataclass(eq=False)
class Run:
    """A suite's run: its options, resolved on this machine."""

    options: Options
    seconds: float  # for a row; 0: each once
    device: str
    progress: Console
    machine: dict[str, Any]
    path: Path  # of the JSON
    started: float = field(default_factory=time.perf_counter)


def start(options: Options, *, seconds: float, progress: Console | None = None) -> Run:
    """Resolve what the options leave open; `seconds` is the suite's default. Raises `ArgumentError`."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device is cuda, but torch sees no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = describe_machine(device)
    path = result_path(
        suite=options.suite,
        device=Report(machine=machine).device,
        date=machine["date"],
        variant=options.variant,
        output=options.output,
    )
    chosen = seconds if options.seconds is None else options.seconds
    return Run(
        options=options,
        seconds=0.0 if options.quick else chosen,
        device=device,
        progress=progress or Console(stderr=True, soft_wrap=True),
        machine=machine,
        path=path,
    )


def publish(run: Run, *, markdown: str, save_plots: Callable[[], list[Path]], tables: Iterable[Table]) -> None:
    """Tables and plots beside the JSON, and the tables on the terminal, in this order."""
    page = run.path.with_suffix(".md")
    page.write_text(markdown, encoding="utf-8")
    written = [run.path, page]
    try:
        written += save_plots()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        run.progress.print(NO_PLOTS)
    terminal = Console() if sys.stdout.isatty() else Console(width=160)  # files and pipes are not folded
    for table in tables:
        table.print(terminal)
    taken = time.perf_counter() - run.started
    run.progress.print(f"{taken:.0f} s; wrote {', '.join(map(str, written))}", soft_wrap=True)


__all__ = ["Run", "publish", "start"]
