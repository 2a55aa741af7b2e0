"""Runs `sdcore report`, which writes one page about a run, or about several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcore.cli.running import readable_errors


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output directories of `sdcore train`.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="report.html in the first run's directory")
    ] = None,
    format: Annotated[str, typer.Option(help="html, one file; or markdown, with PNGs beside it.")] = ("html"),
) -> None:
    """Write one self-contained page about a run.

    Curves, entropy gap, drift, and sampled completions with the divergence of each token.

    \b
    While it is still training, too; and several runs compared:
      sdcore report run --output report.html
      sdcore report run-sdpo run-grpo --output compared.html
    """
    with readable_errors("report"):
        from sdcore.report import write_report

        written = write_report(runs, output, format=format)  # type: ignore[arg-type]  # checked there
        typer.echo(f"report: {written}")
