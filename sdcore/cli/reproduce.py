"""`sdcore reproduce`: the methods' claims, run again on the small world with controls beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcore.cli.running import console, quiet_libraries, readable_errors


def reproduce(
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
      sdcore reproduce --output reproduction
    Three minutes, one claim:
      sdcore reproduce --quick --claim sdft --seeds 2
    """
    with readable_errors("reproduce"), quiet_libraries():
        from sdcore.reproduce.table import run

        run(
            output,
            seeds=seeds,
            claims=claim,
            quick=quick,
            resume=resume,
            workers=workers,
            console=console(),
        )
