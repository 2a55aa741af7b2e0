"""Shows a run as one file: what changed, curves, samples with each token's divergence, and what the words mean.

    path = write_report("out")                                   # out/report.html
    write_report("out", format="markdown")                       # out/report.md and PNGs beside it
    write_report(["sdft", "sft"], "compared.html")               # several runs: a line of each in every chart

The page is self-contained and has no script: texts of the run are escaped, and its own policy forbids scripts and the
network, so that a completion cannot do anything either. Charts are inline SVG, drawn by matplotlib, the extra `plot`.

Not covered: what the run did not log. Where a metric is missing, so is its chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from ..charts import require_matplotlib
from ..diagnostics import RunLogError, read_run
from ..errors import ArgumentError

Format = Literal["html", "markdown"]
SUFFIXES: dict[str, str] = {"html": ".html", "markdown": ".md"}


def write_report(
    run_directory: str | Path | Sequence[str | Path], output: str | Path | None = None, *, format: Format = "html"
) -> Path:
    """Writes the report of a run, or of several that are compared, and returns its path.

    `run_directory` is what the run's `RunLog` wrote to. `output` is a file, or a directory that gets `report.html`;
    None is the (first) run's directory. A report that is there already is replaced. Raises `RunLogError` (an `OSError`)
    for a directory without a run and for a file that cannot be written, `ArgumentError` for no directory at all or an
    unknown format, and `ImportError` without matplotlib, before any work.
    """
    if format not in get_args(Format):
        raise ArgumentError(f"format must be one of {', '.join(map(repr, get_args(Format)))}, got {format!r}")
    given = [run_directory] if isinstance(run_directory, str | Path) else list(run_directory)
    if not given:
        raise ArgumentError("run_directory must be a directory or a list of them, got an empty list")
    require_matplotlib("a report")
    runs = [read_run(directory) for directory in given]
    labels = _labels([run.directory for run in runs])
    path = runs[0].directory if output is None else Path(output)
    if path.is_dir():
        path /= f"report{SUFFIXES[format]}"
    named = list(zip(labels, runs, strict=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if format == "html":
            from .page import page

            text = page(named)
        else:
            from .markdown import markdown

            text = markdown(named, path)
        # Half of a surrogate pair is a token's, not a character: a question mark takes its place.
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunLogError(error.errno, f"could not write the report ({error.strerror or error})", str(path)) from error
    return path


def _labels(directories: Sequence[Path]) -> list[str]:
    """Names each directory by the last parts of its path that tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{i + 1}: {directory.name}" for i, directory in enumerate(directories)]


__all__ = ["Format", "write_report"]
