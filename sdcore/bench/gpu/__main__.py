"""`python -m sdcore.bench.gpu [STEP ...]`, behind benchmarks/gpu_run.sh.

With argparse and not typer, which a lent machine may lack.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import ArgumentError
from ..places import checkout
from .plan import CPU, CUDA, SECONDS, STEPS, chosen_steps
from .run import Settings, archive, run, show


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if all that was asked for is done, 1 if not, 2 if it cannot be."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_run.sh",
        description="Tests, tunes and measures on a CUDA device, in steps; a second start goes on where one ended.",
        epilog="Steps: " + "; ".join(f"{step.name} ({step.seconds} s): {step.about}" for step in STEPS),
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, without a GPU: is the way free?")
    parser.add_argument("--list", action="store_true", help="only show the steps, their limits, and what is done")
    parser.add_argument("--docs", action="store_true", help="only renew the table of docs/gpu.md")
    options = parser.parse_args(arguments)
    mode = CPU if options.cpu or os.environ.get("GPU_RUN_MODE") == CPU else CUDA
    try:
        if options.docs:
            from .goals import renew_docs

            sys.stdout.write(f"renewed {renew_docs()}\n")
            return 0
        steps = chosen_steps(options.steps)
        settings = Settings(
            mode=mode,
            folder=_folder(mode),
            seconds=_seconds(mode),
            command=[sys.executable, "-m", "sdcore.bench.gpu.parts"],
            out=Path(os.environ["OUT"]) if os.environ.get("OUT") else None,
        )
        if not options.list:
            parts = run(steps, settings)
            settings.say(_results(settings))
            archive(settings)
        settings.say("\n".join(show(steps, settings)))
    except ArgumentError as error:
        sys.stderr.write(f"gpu_run: {error}\n")
        return 2
    return 0 if options.list or all(part.state == "done" for part in parts) else 1


def _folder(mode: str) -> Path:
    chosen = os.environ.get("GPU_RUN_FOLDER")
    if chosen:
        return Path(chosen)
    return (checkout() or Path()) / "build" / ("gpu-run" if mode == CUDA else "gpu-run-cpu")


def _seconds(mode: str) -> float:
    text = os.environ.get("GPU_RUN_SECONDS", str(SECONDS[mode]))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ArgumentError(f"GPU_RUN_SECONDS must be a positive number, got {text!r}")
    return seconds


def _results(settings: Settings) -> str:
    """Write what was found, as Markdown; returns the goals."""
    from .goals import goals_table, read, results_page

    results = read(settings.folder)
    (settings.folder / "results.md").write_text(results_page(results), encoding="utf-8")
    return goals_table(results)


if __name__ == "__main__":
    sys.exit(main())
