"""Runs `sdcore conform`, which asks a distillation loss what it does in some eighty situations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcore.cli.running import console, readable_errors

if TYPE_CHECKING:
    from sdcore.conform.runner import Result


def conform(
    target: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:FUNCTION", help="Your loss, or a peer by its name."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All peers that are installed, and ours.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for conformance.json and conformance.md; with --all.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="After which a situation without an answer has crashed.")] = 300.0,
) -> None:
    """Hold a distillation loss to a float64 truth in some eighty situations: masks, dtypes, chunks, bad settings.

    FUNCTION, of a MODULE or a FILE.py, takes keyword arguments and returns the loss in the graph, or an object with it
    as `loss`:

    \b
      def loss(*, student_hidden, student_weight, teacher_hidden, teacher_weight, alpha):
    (N, H), (V, H), (N, Ht), (V, Ht), and 0 for KL(teacher||student), 1 for KL(student||teacher). What else it takes of
    `sdcore.conform.cases.OPTIONS` is tried too (temperature, token_weights, topk, reduction, ...); what it does not
    take is not offered, which is no failure. Exit code 1 if anything was wrong, refused unclearly, or crashed.

    \b
      sdcore conform sdkernels:linear_divergence
      sdcore conform my_trainer.losses:distillation_loss
      sdcore conform --all --output docs        ten minutes at most on two cores
    """
    with readable_errors("conform"):
        from sdcore.conform.adapters import ADAPTERS, OURS
        from sdcore.conform.runner import results
        from sdcore.conform.table import FAILURES, document, write
        from sdcore.errors import ArgumentError

        if (target is None) != everything:
            raise ArgumentError("give either MODULE:FUNCTION or --all")
        if output is not None and not everything:
            raise ArgumentError("output is for --all")
        if not seconds > 0:
            raise ArgumentError(f"seconds must be above 0, got {seconds}")
        started, found, missing = time.monotonic(), {}, {}
        for name in ADAPTERS if everything else (str(target),):
            if everything and (reason := ADAPTERS[name].missing()):
                missing[name] = reason
                typer.echo(f"{name}: {reason}")
                continue
            found[name] = dict(results(name, seconds=seconds))
            _show(name, found[name])
        if output is not None:
            paths = write(output, document(found, missing, time.monotonic() - started))
            typer.echo(f"wrote {', '.join(map(str, paths))}")
        held = OURS if everything else found  # others' faults are no failure of a run
        if any(result.kind in FAILURES for name in held if name in found for result in found[name].values()):
            raise typer.Exit(code=1)


def _show(name: str, results: dict[str, Result]) -> None:
    from collections import Counter

    from sdcore.conform.table import FAILURES, cell

    counts = Counter(result.kind for result in results.values())
    console().print(f"[bold]{name}[/]: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    for situation, result in results.items():
        if result.kind in FAILURES:
            typer.echo(f"  {situation}: {cell(result).strip('*')} {result.note}")
