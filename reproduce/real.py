"""Reads the options of `python -m reproduce.real`: the studies on SmolLM2-135M-Instruct and Gemma 3 270M."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from sdcore.cli.running import console, quiet_libraries
from sdcore.errors import ArgumentError, SdcoreError

PAGE: Final = "real.md"


def main(
    output: Annotated[Path, typer.Option(help="Directory for raw numbers, tables and plots.")] = Path("reproduction"),
    study: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every arm.")] = 3,
    quick: Annotated[bool, typer.Option(help="Two steps on three facts: does the code work?")] = False,
    resume: Annotated[bool, typer.Option(help="Keep the runs that are in the directory.")] = True,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    smollm2: Annotated[str | None, typer.Option(help="Path of SmolLM2; default: that of the package.")] = None,
    gemma3: Annotated[str | None, typer.Option(help="Path of Gemma 3 270M; default: that of the package.")] = None,
) -> None:
    """Run the methods' claims again on two real models, with controls.

    Context distillation, SDFT and SDPO beside SFT and GRPO; what was killed goes on where it was.

    \b
    All studies, each at most an hour and a half on two cores:
      python -m reproduce.real --output docs/reproduction
    One of them:
      python -m reproduce.real --output docs/reproduction --study real_context
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
                claims=study,
                quick=quick,
                resume=resume,
                workers=workers,
                console=console(),
                page=PAGE,
            )
    except (SdcoreError, OSError, ImportError) as error:
        typer.echo(f"reproduce.real: {error}", err=True)
        raise typer.Exit(code=2 if isinstance(error, ArgumentError) else 1) from error


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m reproduce.real")
