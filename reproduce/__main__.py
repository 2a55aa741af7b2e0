"""Reads the options of `python -m reproduce`. Nothing heavy is imported before they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from sdcore.cli.running import console, quiet_libraries
from sdcore.errors import ArgumentError, SdcoreError


def main(
    output: Annotated[Path, typer.Option(help="Directory for raw numbers, tables and plots.")] = Path("reproduction"),
    group: Annotated[
        Literal["small", "real"] | None,
        typer.Option(help="Studies on the small world, or on SmolLM2 and Gemma 3; default: that of --study, or small."),
    ] = None,
    study: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of every arm; default: 5, on real models 3.")] = None,
    quick: Annotated[bool, typer.Option(help="A small subset: does the code work? Not: what is true?")] = False,
    resume: Annotated[bool, typer.Option(help="Keep the runs that are in the directory.")] = True,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    smollm2: Annotated[str | None, typer.Option(help="Path of SmolLM2; default: that of the package.")] = None,
    gemma3: Annotated[str | None, typer.Option(help="Path of Gemma 3 270M; default: that of the package.")] = None,
) -> None:
    """Run the methods' claims again, with controls.

    SDFT, SDPO, the RL tilt, test-time discovery and context distillation, on the small world or on two real models.

    \b
    Mean and standard error over seeds, and what did not reproduce stated first; under half an hour on two cores:
      python -m reproduce --output reproduction
    Three minutes, one claim:
      python -m reproduce --quick --study sdft --seeds 2
    On SmolLM2-135M-Instruct and Gemma 3 270M, at most an hour and a half for each study; what was killed goes on:
      python -m reproduce --group real --output reproduction
    """
    for name, path in (("REPRODUCE_SMOLLM2", smollm2), ("REPRODUCE_GEMMA3", gemma3)):
        if path is not None:
            os.environ[name] = path  # the workers read it
    try:
        with quiet_libraries():
            from reproduce.table import run

            run(
                output,
                seeds=seeds,
                group=group,
                studies=study,
                quick=quick,
                resume=resume,
                workers=workers,
                console=console(),
            )
    except (SdcoreError, OSError, ImportError) as error:
        typer.echo(f"reproduce: {error}", err=True)
        raise typer.Exit(code=2 if isinstance(error, ArgumentError) else 1) from error


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m reproduce")
