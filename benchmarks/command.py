"""What the suites' commands have in common: their options, and how they show tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.tables import Table


def parser(*, prog: str, description: str, quick: str, seconds: float, output: str) -> argparse.ArgumentParser:
    """`quick` says what a quick run does, `seconds` is the default time for a row, `output` where results go."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    made.add_argument("--quick", action="store_true", help=f"{quick}: does it all work?")
    made.add_argument(
        "--seconds", type=float, default=seconds, help=f"time to spend on repeating each row (default {seconds:g})"
    )
    made.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    made.add_argument("--output", type=Path, help=f"JSON to write; default: {output}")
    return made


def print_tables(tables: Iterable[Table]) -> None:
    """To the terminal; wide where there is none, so that files and pipes are not folded."""
    terminal = Console()
    if not terminal.is_terminal:
        terminal = Console(width=160)
    for table in tables:
        table.print(terminal)


__all__ = ["parser", "print_tables"]
