"""Reads the options of `python -m reproduce`. Nothing heavy is imported before they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcore.cli.running import console, quiet_libraries
from sdcore.errors import ArgumentError, SdcoreError


def main(
    output: Annotated[Path, typer.Option(help="Directory for raw numbers, tables and plots.")] = Path("reproduction"),
    claim: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every arm.")] = 5,
    quick: Annotated[bool, typer.Option(help="A small subset: does the code work? Not: what is true?")] = False,
    resume: Annotated[bool, typer.Option(help="Keep the runs that are in the directory.")] = True,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
) -> None:
    """Run the methods' claims again, with controls.

    SDFT, SDPO, the RL tilt, test-time discovery and context distillation, on the small world.

    \b
    Mean and standard error over seeds, and what did not reproduce stated first; under half an hour on two cores:
      python -m reproduce --output reproduction
    Three minutes, one claim:
      python -m reproduce --quick --claim sdft --seeds 2
    """
    try:
        with quiet_libraries():
            from reproduce.table import run

            run(
                output,
                seeds=seeds,
                claims=claim,
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
